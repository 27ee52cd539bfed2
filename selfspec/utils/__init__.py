"""Helpers that know nothing of models; every package may import them."""
