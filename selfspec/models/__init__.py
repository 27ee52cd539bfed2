"""Models: how a Hugging Face model becomes its own draft.

Imported by the runtime and all above it.
"""
