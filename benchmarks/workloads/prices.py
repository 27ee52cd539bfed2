"""Prices: the seconds of a decoding by its counts and by round costs, without the noise of the machine."""

from __future__ import annotations

from dataclasses import dataclass

from selfspec.decoding.stats import Stats
from selfspec.plan.round_costs import RoundCosts


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices decodings of one number of rows, without prefill, which is the same for all drafters."""

    round_costs: RoundCosts
    looks: bool  # whether the decoding uses prompt lookup

    def seconds(self, stats: Stats) -> float:
        """Seconds of all counted rounds."""
        round_costs, passes = self.round_costs, sum(stats.pass_lengths.values())
        rounds = sum(round_costs.rounds[tokens - 1] * count for tokens, count in stats.pass_lengths.items())
        looking = round_costs.lookup * passes if self.looks else 0.0
        return rounds + looking + stats.steps * round_costs.draft_step

    def speed(self, stats: Stats) -> float:
        """Tokens per priced second."""
        return stats.tokens / self.seconds(stats)
