"""Judging: a method's sets get their draft lengths, and the best of them decode held-out prompts for real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from selfspec_search.replay.replay import Replay
from selfspec_search.replay.rounds import Drafting
from selfspec_search.replay.table import Table
from selfspec_search.study.objective import Prediction, Prices, best, predict
from torch import Tensor
from transformers import PreTrainedModel

from methods.context import JUDGED, Context, Select
from selfspec.benchmark.contenders import PLAIN, Ours
from selfspec.benchmark.measure import Measurement, Ratio, measure
from selfspec.plan import Plan
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.sublayers import SkipSet
from selfspec.speculator import SelfSpeculator

OURS = "ours"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A plan that takes part, the method that chose its skip set, and how long the method searched.

    Attributes:
        tried: sets that the method tried one by one; None where it builds its sets.
        offered: sets that it came up with in the end, of which the best few take part.
    """

    method: str
    name: str
    plan: Plan
    ratio: float | None
    predicted: float
    tried: int | None
    offered: int
    seconds: float


def enter(method: str, select: Select, context: Context, replay: Replay, budget: float, seed: int) -> list[Entry]:
    """Let a method select; the best of its sets, each with the draft length that replay finds best.

    That is the most generous reading: the draft length is not the method's own, but the one that is predicted to
    suit its set best, on the same calibration texts that ours is searched on, and its choice costs it no time.
    """
    start = perf_counter()
    selection = select(context, budget, seed)
    seconds = perf_counter() - start
    ratios = {candidate.skip_set: candidate.ratio for candidate in reversed(selection.offered) if candidate.skip_set}
    predictions = sorted((price(replay, context, skip_set) for skip_set in ratios), key=lambda p: -p.speedup)
    # Whoever finds nothing to skip decodes plainly.
    plans = [(prediction.plan, prediction.speedup) for prediction in predictions[:JUDGED]] or [(Plan.none(), 1.0)]
    return [
        Entry(
            method=method,
            name=method if rank == 0 else f"{method}, its next",
            plan=plan,
            ratio=ratios.get(plan.skip_set),
            predicted=predicted,
            tried=selection.tried,
            offered=len(ratios),
            seconds=seconds,
        )
        for rank, (plan, predicted) in enumerate(plans)
    ]


def predicted_speedup(replay: Replay, context: Context, plan: Plan) -> float:
    """Of a plan without prompt lookup, at the prices of all others here."""
    if not plan.speculates:
        return 1.0
    ways = [Drafting(plan.gamma)]
    return predict(_table(replay, plan.skip_set), Prices(costs=context.costs), plan.draft_spec, ways)[0].speedup


def price(replay: Replay, context: Context, skip_set: SkipSet) -> Prediction:
    """A set with the draft length that suits it best."""
    return best(_table(replay, skip_set), Prices(costs=context.costs), DraftSpec.of(skip_set))


def _table(replay: Replay, skip_set: SkipSet) -> Table:
    table = replay.run(skip_set)
    return table


def judge(
    model: PreTrainedModel,
    entries: Sequence[Entry],
    prompts: Sequence[Tensor],
    *,
    new_tokens: int,
    repeats: int,
) -> Measurement:
    """Decode every prompt with every plan and plainly, interleaved."""
    plans = {PLAIN: Plan.none(), **{entry.name: entry.plan for entry in entries}}
    contenders = [Ours(name, SelfSpeculator(model, plan)) for name, plan in plans.items()]
    return measure(contenders, prompts, new_tokens=new_tokens, repeats=repeats)


def rows(measured: Measurement, entries: Sequence[Entry], context: Context) -> list[dict[str, Any]]:
    """For each plan what was chosen, predicted and measured, ready for JSON; the fastest first."""
    longest = max(entry.plan.longest_draft for entry in entries)
    runtime = next(c for c in measured.contenders if isinstance(c, Ours)).spec.runtime
    scores = {score.name: score for score in measured.scores(runtime, against=[PLAIN], gamma=max(longest, 1))}
    ours = [entry.name for entry in entries if entry.method == OURS]
    found = [
        {
            "method": entry.method,
            **scores[entry.name].to_dict(),
            "speedup": scores[entry.name].ratios[PLAIN].to_dict(),
            "ours_over_it": _against(measured, ours, entry).to_dict() if _is_rival(entry, ours) else None,
            "predicted_speedup": round(entry.predicted, 4),
            "draft_cost": round(draft_cost(context, entry.plan.skip_set), 4) if entry.plan.gamma else None,
            "skip_set": entry.plan.skip_set.to_dict(),
            "gamma": entry.plan.gamma,
            "ratio": entry.ratio,
            "tried": entry.tried,
            "offered": entry.offered,
            "selection_seconds": round(entry.seconds, 2),
        }
        for entry in entries
    ]
    for row in found:
        del row["ratios"], row["settings"]
    return sorted(found, key=lambda row: -row["speedup"]["value"])


def best_of_each(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest row of each method, as measured: a rival is allowed what it could not have known."""
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: -row["speedup"]["value"]):
        best.setdefault(row["method"], row)
    return list(best.values())


def verdict(row: dict[str, Any]) -> str:
    """Whether ours is faster than a rival's row, beyond the 95 % interval."""
    against = row["ours_over_it"]
    if against is None:
        return ""
    return "faster" if against["low"] > 1 else "slower" if against["high"] < 1 else "level"


def draft_cost(context: Context, skip_set: SkipSet) -> float:
    """A step of the draft, in steps of a draft that skips nothing."""
    return context.costs.draft_step(skip_set) / context.costs.draft_step(SkipSet())


def _is_rival(entry: Entry, ours: Sequence[str]) -> bool:
    return bool(ours) and entry.method != OURS


def _against(measured: Measurement, ours: Sequence[str], entry: Entry) -> Ratio:
    return measured.ratio(ours[0], entry.name)
