"""SearchResult: the plan of a search and the findings behind the plan, as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from selfspec.plan.plan import Plan
from selfspec.plan.provenance import Figures
from selfspec_search.confirm.confirm import Confirmed
from selfspec_search.profile.profile import Profile


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The result of a search."""

    plan: Plan  # `plan.speculates` is False if plain decoding won
    plains: dict[str, Figures]  # measured figures of plain decoding, by name; the faster first
    confirmed: Sequence[Confirmed]  # the fastest first
    winner: Confirmed | None  # the confirmed plan that became `plan`; None if plain decoding won
    profile: Profile  # of this device
    trials_complete: int  # of all workers of the study
    trials_pruned: int
    interrupted: bool  # whether the user ended the trials early
    seconds: dict[str, float]  # by phase
    cuts: Sequence[str] = ()  # what was cut short to keep the budget

    @property
    def plain(self) -> Figures:
        """Measured figures of the faster plain decoding, the baseline of all speedups."""
        return next(iter(self.plains.values()))

    @property
    def rounds_equal(self) -> bool:
        """Whether replay and greedy decoding agree in every round of every confirmed plan."""
        return all(confirmed.rounds_equal is not False for confirmed in self.confirmed)

    @property
    def differing_texts(self) -> int:
        """Decoded texts of all confirmed plans that differ from plain decoding."""
        return sum(confirmed.differing_texts for confirmed in self.confirmed)

    def rows(self) -> list[dict[str, str]]:
        return table(self.plains, self.confirmed)

    @property
    def why(self) -> str:
        return why(self.confirmed, self.winner)


def table(plains: Mapping[str, Figures], confirmed: Sequence[Confirmed]) -> list[dict[str, str]]:
    """Predicted and measured figures of plain decoding and of each confirmed plan, the fastest first."""
    rows = [(figures.speedup, _plain_row(name, figures)) for name, figures in plains.items()]
    rows += [(one.measured.speedup, _row(one)) for one in confirmed]
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])]


def why(confirmed: Sequence[Confirmed], winner: Confirmed | None) -> str:
    """Why the winner, or plain decoding without one, was chosen over the plan that measured best; else empty."""
    best = max(confirmed, key=lambda one: one.measured.speedup)
    if best is winner or best.measured.speedup <= 1:
        return ""
    if best.is_faster:
        reason = "the chosen plan is as fast to two digits and drafts with less"
    elif best.measured.interval[0] <= 1:
        reason = f"its 95 % interval ({_interval(best.measured)}) includes plain decoding"
    else:
        reason = "it was not faster than plain decoding in every repeat"
    return f"'{best.prediction.plan}' measured {best.measured.speedup:.2f}x, but {reason}."


def _interval(figures: Figures) -> str:
    low, high = figures.interval
    return f"{low:.2f}-{high:.2f}"


def _plain_row(name: str, figures: Figures) -> dict[str, str]:
    return {
        "plan": name,
        "speedup predicted": "1.00",
        "on held-out": "1.00",
        "measured": f"{figures.speedup:.2f}",
        "95 %": _interval(figures),
        "tokens/s": f"{figures.tokens_per_second:.1f}",
        "tokens/round": "1.00",
        "by replay": "1.00",
        "acceptance": "",
        "differing texts": "0",
    }


def _row(confirmed: Confirmed) -> dict[str, str]:
    measured = confirmed.measured
    return {
        "plan": str(confirmed.prediction.plan),
        "speedup predicted": f"{confirmed.prediction.speedup:.2f}",
        "on held-out": f"{confirmed.predicted_on_held_out.speedup:.2f}",
        "measured": f"{measured.speedup:.2f}",
        "95 %": _interval(measured),
        "tokens/s": f"{measured.tokens_per_second:.1f}",
        "tokens/round": f"{confirmed.tokens_per_round_decoded:.2f}",
        "by replay": f"{confirmed.tokens_per_round_replayed:.2f}",
        "acceptance": f"{measured.acceptance_rate:.0%}",
        "differing texts": "" if confirmed.samples else str(confirmed.differing_texts),
    }
