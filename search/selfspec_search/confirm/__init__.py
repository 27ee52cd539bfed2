"""Confirm: decode held-out prompts with the best plans, and write the plan.

Only the pipeline may import this package.
"""
