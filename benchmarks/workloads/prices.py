"""Prices: what a decoding costs by its counts and measured prices, whatever else the machine was doing."""

from __future__ import annotations

from dataclasses import dataclass

from selfspec.decoding.stats import Stats
from selfspec.plan import RoundCosts


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Seconds of what a decoding is made of, for one number of rows. Prefill, the same for all, is left out.

    Attributes:
        round costs: what a round costs at every length, a look, and a step of the draft.
        looks: whether the decoding looks prompts up.
    """

    round_costs: RoundCosts
    looks: bool

    def seconds(self, stats: Stats) -> float:
        """Of all rounds that were counted."""
        round_costs, passes = self.round_costs, sum(stats.pass_lengths.values())
        rounds = sum(round_costs.rounds[tokens - 1] * count for tokens, count in stats.pass_lengths.items())
        looking = round_costs.lookup * passes if self.looks else 0.0
        return rounds + looking + stats.steps * round_costs.draft_step

    def speed(self, stats: Stats) -> float:
        """Tokens per priced second."""
        return stats.tokens / self.seconds(stats)
