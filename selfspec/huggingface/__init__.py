"""The edge to Hugging Face: loading, prompts, the call of `generate`, its options and its streamers.

Imported by the speculator and the layers above it.
"""
