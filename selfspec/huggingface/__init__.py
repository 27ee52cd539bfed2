"""Hugging Face at the edge: loading, prompts, the `generate` call, its options and its streamers.

Imported by the speculator and all above it.
"""
