"""Decoding: a round (draft, verify, accept, commit, rewind), and the request, drafts and stats that a round works on.

Imported by the drafters and every package above the drafters.
"""
