"""What `benchmarks/drafters.py` measures, and the workloads it gives to the drafters, one noun per file."""
