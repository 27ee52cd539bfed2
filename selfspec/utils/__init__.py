"""Utilities without a subject of their own: files, sizes, statistics. Imported by everyone."""
