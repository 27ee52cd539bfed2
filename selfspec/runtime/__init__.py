"""Runtime: passes of target and draft over one KV cache, compiled and captured where the device allows it.

Imported by decoding and all above it.
"""
