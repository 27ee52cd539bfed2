"""The mid-size model of `benchmarks/midsize.py`: size, sources and training, on top of the demo's code."""
