"""Models: how a Hugging Face model becomes its own draft.

The runtime and all packages above the runtime import this package.
"""
