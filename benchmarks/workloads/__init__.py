"""Workloads: prompts, plans, prices and measurements of `benchmarks/drafters.py`."""
