"""Plan: what the search writes and everything else reads. The package imports no torch.

Imported by the models and all packages above them.
"""
