"""Runtime: passes of target and draft over one KV cache, compiled and captured where the device supports it.

The package `decoding` and all packages above `decoding` import this package.
"""
