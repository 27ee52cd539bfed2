"""Replay: compute what a draft would have got accepted, from texts that the target wrote.

The profile, the study and the packages above them may import this package.
"""
