"""Benchmark: ways of decoding measured against one another, and the check that they decode alike.

Imported by the command line and by the search.
"""
