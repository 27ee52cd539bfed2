"""Decoding: a round (draft, verify, accept, rewind) and what it works on.

Imported by the drafters and all above them.
"""
