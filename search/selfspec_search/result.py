"""SearchResult: the plan, and everything that was found on the way, ready to be printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfspec.plan import Figures, Plan
from selfspec_search.confirm import Confirmed
from selfspec_search.profile import Profile
from selfspec_search.walk import Drafting


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found. `confirmed` is in order of measured speed; figures are those of `plan`.

    Where plain decoding won, `plan.speculates` is False, the figures are plain decoding's, and `confirmed` shows what
    was beaten. `interrupted` says that the user ended the trials early.
    """

    plan: Plan
    plain: Figures
    confirmed: Sequence[Confirmed]
    calibration_figures: Figures
    held_out_figures: Figures
    profile: Profile
    trials_complete: int
    trials_pruned: int
    interrupted: bool
    seconds: dict[str, float]

    @property
    def winner(self) -> Confirmed | None:
        """The confirmed plan that won; None where plain decoding did."""
        return self.confirmed[0] if self.plan.speculates else None

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
        """Whether replay and decoding agree in every round of every plan that was confirmed."""
        return all(confirmed.rounds_equal for confirmed in self.confirmed)

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

    def summary(self) -> str:
        """A few lines for the terminal."""
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        ended = ", interrupted" if self.interrupted else ""
        lines = [f"{self.trials_complete} trials, and {self.trials_pruned} ended early{ended} ({phases})"]
        if self.winner is None:
            lines.append("plain decoding won: the plan says not to speculate")
        else:
            w = self.winner
            lines += [
                f"skip {self.plan.skip_set}; {_drafting(w.prediction.drafting)}",
                f"speedup: predicted {w.prediction.speedup:.2f} on calibration prompts, "
                f"{w.predicted_on_held_out.speedup:.2f} on held-out ones; measured {w.measured.speedup:.2f} "
                f"({self.plain.tokens_per_second:.1f} -> {w.measured.tokens_per_second:.1f} tokens/s)",
            ]
        for confirmed in self.confirmed:
            same = "equal in every round" if confirmed.rounds_equal else "NOT equal in every round"
            lines.append(
                f"tokens per round on {confirmed.measured.texts} held-out texts: replay "
                f"{confirmed.tokens_per_round_replayed:.3f}, decoding {confirmed.tokens_per_round_decoded:.3f}, {same} "
                f"({confirmed.rounds} rounds); texts unlike the plain model's: {confirmed.differing_texts}"
            )
        return "\n".join(lines)


def _row(confirmed: Confirmed) -> dict[str, str]:
    measured = confirmed.measured
    return {
        "plan": f"{confirmed.prediction.skip_set}; {_drafting(confirmed.prediction.drafting)}",
        "speedup predicted": f"{confirmed.prediction.speedup:.2f}",
        "on held-out": f"{confirmed.predicted_on_held_out.speedup:.2f}",
        "measured": f"{measured.speedup:.2f}",
        "tokens/s": f"{measured.tokens_per_second:.1f}",
        "tokens/round": f"{confirmed.tokens_per_round_decoded:.2f}",
        "by replay": f"{confirmed.tokens_per_round_replayed:.2f}",
        "acceptance": f"{measured.acceptance_rate:.0%}",
        "differing texts": str(confirmed.differing_texts),
    }


def _drafting(way: Drafting) -> str:
    threshold = "" if way.threshold is None else f", exit below {way.threshold:.3f}"
    return f"gamma {way.gamma}{threshold}"
