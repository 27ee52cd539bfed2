"""SearchResult: the plan, and everything that was found on the way, ready to be printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfspec.plan import Figures, Plan
from selfspec_search.confirm.confirm import Confirmed
from selfspec_search.profile.profile import Profile


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found. `confirmed` is in order of measured speed; `winner` is the one that `plan` is made of.

    Where plain decoding won, `plan.speculates` is False, the figures are plain decoding's, and `confirmed` shows what
    was beaten. `interrupted` says that the user ended the trials early.
    """

    plan: Plan
    plain: Figures
    confirmed: Sequence[Confirmed]
    winner: Confirmed | None
    profile: Profile
    trials_complete: int
    trials_pruned: int
    interrupted: bool
    seconds: dict[str, float]

    @property
    def tokens_per_round_replayed(self) -> float:
        """By replay, on the held-out texts that were decoded; 1 for plain decoding."""
        return self.winner.tokens_per_round_replayed if self.winner else 1.0

    @property
    def tokens_per_round_decoded(self) -> float:
        """By decoding, on the same texts."""
        return self.winner.tokens_per_round_decoded if self.winner else 1.0

    @property
    def rounds_equal(self) -> bool:
        """Whether replay and greedy decoding agree in every round of every plan that was confirmed."""
        return all(confirmed.rounds_equal is not False for confirmed in self.confirmed)

    @property
    def differing_texts(self) -> int:
        """Decoded texts that are not the plain model's, over all plans that were confirmed."""
        return sum(confirmed.differing_texts for confirmed in self.confirmed)

    def rows(self) -> list[dict[str, str]]:
        """A table: one row per way of decoding, predicted and measured side by side, the fastest first."""
        plain = {
            "plan": "plain decoding",
            "speedup predicted": "1.00",
            "on held-out": "1.00",
            "measured": "1.00",
            "tokens/s": f"{self.plain.tokens_per_second:.1f}",
            "tokens/round": "1.00",
            "by replay": "1.00",
            "acceptance": "",
            "differing texts": "0",
        }
        rows = [(1.0, plain), *((confirmed.measured.speedup, _row(confirmed)) for confirmed in self.confirmed)]
        return [row for _, row in sorted(rows, key=lambda pair: -pair[0])]


def _row(confirmed: Confirmed) -> dict[str, str]:
    measured = confirmed.measured
    return {
        "plan": str(confirmed.prediction.plan),
        "speedup predicted": f"{confirmed.prediction.speedup:.2f}",
        "on held-out": f"{confirmed.predicted_on_held_out.speedup:.2f}",
        "measured": f"{measured.speedup:.2f}",
        "tokens/s": f"{measured.tokens_per_second:.1f}",
        "tokens/round": f"{confirmed.tokens_per_round_decoded:.2f}",
        "by replay": f"{confirmed.tokens_per_round_replayed:.2f}",
        "acceptance": f"{measured.acceptance_rate:.0%}",
        "differing texts": "" if confirmed.samples else str(confirmed.differing_texts),
    }
