"""Models of real sizes with random weights: what `benchmarks/gpu.py` and `benchmarks/quantised.py` measure."""
