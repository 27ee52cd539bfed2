"""Shapes: models of real sizes with random weights, for `benchmarks/gpu.py` and `benchmarks/quantised.py`."""
