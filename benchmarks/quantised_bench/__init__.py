"""What `benchmarks/quantised.py` measures, one noun per file."""
