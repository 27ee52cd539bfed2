"""What every benchmark script uses."""
