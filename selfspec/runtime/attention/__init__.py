"""Attention backends: each appends a pass's keys and values to the KV cache and attends to it.

Only the runtime imports this package.
"""
