"""Cells: one draft at one agreement, held against its rivals. *Time real, agreement set.*"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu_bench.agreement import find_scale
from gpu_bench.budget import LeftOutError
from gpu_bench.limits import ideal_speedup

from quantised_bench.bench import DRAFTED, PADDED, Bench
from quantised_bench.ceilings import Ceiling, ceiling
from quantised_bench.drafts import share_skipped, with_head
from quantised_bench.passes import Passes
from selfspec import SkipSet
from selfspec.benchmark.contenders import GENERATE, PLAIN
from selfspec.benchmark.measure import Measurement, measure

REACH = 16.0
"""The largest scale that is tried: 8 bits err so little that they disagree only with targets far away."""
FIRST_GUESS = 3.0
"""Scale over disagreement, roughly, in 4 bits."""
OUT_OF_REACH = 2
"""An agreement that was missed by more than so many tolerances is said to be out of reach."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is set.

    Args:
        draft: its name among the passes.
        skip_set: what it skips.
        turn: sets how far the target is from the draft, between 0 and 1; returns what it set, by name.
        guess: where to begin.
    """

    draft: str
    agreement: float
    skip_set: SkipSet | None
    turn: Callable[[float], dict[str, float]]
    guess: float


def cell_of(bench: Bench, agreement: float) -> Cell:
    """A draft that is quantised as a whole."""

    def turn(share: float) -> dict[str, float]:
        bench.scales[agreement] = REACH * share
        bench.dial.turn(REACH * share)
        return {"scale": REACH * share}

    return Cell(
        draft=with_head(bench.format),
        agreement=agreement,
        skip_set=None,
        turn=turn,
        guess=FIRST_GUESS * (1 - agreement) / REACH,
    )


def cell_with_skips(bench: Bench, agreement: float) -> Cell:
    """The same with a published share of skips on top: the dial stays where the highest agreement was, and what the
    skipped sub-layers give is scaled until all together have this one.

    Raises:
        LeftOutError: no higher agreement was measured.
    """
    if max(bench.scales, default=0.0) <= agreement:
        raise LeftOutError(f"it begins where a cell of more agreement than {agreement:g} ends, and none was measured")
    skip_set, scale = bench.subject.skip_set, bench.scales[max(bench.scales)]

    def turn(share: float) -> dict[str, float]:
        bench.dial.turn(scale, skip_set, share)
        return {"scale": scale, "skipped_scale": share}

    return Cell(
        draft=f"{with_head(bench.format)}, {share_skipped(skip_set, bench.subject.num_layers)}",
        agreement=agreement,
        skip_set=skip_set,
        turn=turn,
        guess=FIRST_GUESS * (1 - agreement),
    )


def measure_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Everything of the cell, for the table and the JSON."""
    assert bench.passes is not None, "passes are measured first"
    best = ceiling(bench.passes, cell.draft, cell.agreement)
    bench.draft_by(cell.skip_set, best.gamma)
    was_set, agreement = _set_agreement(bench, cell)
    measured = measure(
        bench.contenders(), bench.prompts, new_tokens=bench.effort.new_tokens, repeats=bench.effort.repeats
    )
    return {
        "draft": cell.draft,
        "basis": "time real, agreement set",
        "agreement_wanted": cell.agreement,
        "agreement": agreement,
        "out_of_reach": abs(agreement - cell.agreement) > OUT_OF_REACH * bench.effort.tolerance,
        **was_set,
        "requantised": bench.dial.requantised(cell.skip_set),
        "gamma": best.gamma,
        **_speeds(bench, measured, bench.passes, best),
    }


def _set_agreement(bench: Bench, cell: Cell) -> tuple[dict[str, float], float]:
    def agreement_at(share: float) -> float:
        cell.turn(share)
        return bench.agreement()

    effort = bench.effort
    share, agreement = find_scale(
        agreement_at, cell.agreement, guess=cell.guess, tolerance=effort.tolerance, steps=effort.steps
    )
    return cell.turn(share), agreement


def _speeds(bench: Bench, measured: Measurement, passes: Passes, best: Ceiling) -> dict[str, Any]:
    """Every contender's score; and ours over the faster of the two that decode plainly."""
    names = [contender.name for contender in measured.contenders]
    better = max((name for name in (PLAIN, PADDED) if name in names), key=measured.tokens_per_second)
    scores = measured.scores(bench.spec.runtime, against=(better, GENERATE), gamma=best.gamma)
    ratio, (ours,) = measured.ratio(DRAFTED, better), [score for score in scores if score.name == DRAFTED]
    assert ours.stats is not None
    ideal = ideal_speedup(ours.stats.tokens_per_round, best.gamma, passes.of(best.draft, best.gamma))
    return {
        "tokens_per_round": ours.stats.tokens_per_round,
        "better_plain": better,
        "speedup": ratio.to_dict(),
        "ceiling": best.speedup,
        "ideal_speedup": ideal,
        "efficiency": ratio.value / ideal,
        "distinct_tokens": bench.distinct(measured.outputs[names.index(PLAIN)]),
        "draft_bytes": bench.spec.stats.draft_bytes,
        "contenders": [score.to_dict() for score in scores],
        "unsteady": measured.unsteady,
    }
