"""selfspec demo."""

from __future__ import annotations

from selfspec.cli import options


def demo(trials: options.Trials = 100, seed: options.Seed = 0) -> None:
    """Show it all on the embedded model."""
