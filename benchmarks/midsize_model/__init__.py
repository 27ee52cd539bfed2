"""The mid-size model that `benchmarks/midsize.py` trains, one noun per file. What it can, it takes from the demo's."""
