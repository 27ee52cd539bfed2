"""Serving: the figures of many requests, for monitoring. The command line may import this package."""
