"""Replay: what a draft would have got accepted, computed from texts that the target wrote.

Imported by the profile, the study and all above them.
"""
