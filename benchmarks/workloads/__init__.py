"""What `benchmarks/drafters.py` is made of: workloads, the plans held against each other, prices, and tables."""
