"""Serving: the figures of many requests, for monitoring. May be imported by the command line."""
