"""Common: run records, machine, prompts, timing, budget and tables of all benchmark scripts."""
