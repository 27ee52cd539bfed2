"""Confirm: the best plans decode held-out prompts, and the plan is written.

Imported by the pipeline alone.
"""
