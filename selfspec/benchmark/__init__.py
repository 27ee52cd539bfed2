"""Benchmark: compares ways to decode, and checks that their outputs are equal.

Imported by the command line and by the search.
"""
