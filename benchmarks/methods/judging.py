"""Judging: gives a method's skip sets their draft lengths, and decodes held-out prompts with the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from selfspec_search.replay.replay import Replay
from selfspec_search.replay.rounds import Drafting
from selfspec_search.study.objective import Prediction, Prices, best, predict
from torch import Tensor
from transformers import PreTrainedModel

from methods.context import JUDGED, Context, Select
from selfspec.benchmark.contenders import Ours, plain_contenders
from selfspec.benchmark.measure import Measurement, measure
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.plan import Plan
from selfspec.plan.sublayers import SkipSet
from selfspec.speculator import SelfSpeculator

OURS = "ours"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A plan that takes part, and the method that chose its skip set."""

    method: str
    name: str
    plan: Plan
    ratio: float | None
    predicted: float  # speedup
    tried: int | None  # skip sets that the method tried; None if it constructs its skip sets
    offered: int  # skip sets of the method
    seconds: float  # of the method


def enter(method: str, select: Select, context: Context, replay: Replay, budget: float, seed: int) -> list[Entry]:
    """Run a method, and enter the best of its skip sets, each with the draft length that replay predicts to be best.

    This favours the method: choosing the draft length costs none of its time.
    """
    start = perf_counter()
    selection = select(context, budget, seed)
    seconds = perf_counter() - start
    ratios = {candidate.skip_set: candidate.ratio for candidate in reversed(selection.offered) if candidate.skip_set}
    predictions = sorted((price(replay, context, skip_set) for skip_set in ratios), key=lambda p: -p.speedup)
    # A method that skips nothing decodes plainly.
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
    """The predicted speedup of a plan without prompt lookup."""
    if not plan.speculates:
        return 1.0
    ways = [Drafting(plan.gamma)]
    return predict(replay.run(plan.skip_set), Prices(costs=context.costs), plan.draft_spec, ways)[0].speedup


def price(replay: Replay, context: Context, skip_set: SkipSet) -> Prediction:
    """The prediction of a skip set at its best draft length."""
    return best(replay.run(skip_set), Prices(costs=context.costs), DraftSpec.of(skip_set))


def judge(
    model: PreTrainedModel, entries: Sequence[Entry], prompts: Sequence[Tensor], *, new_tokens: int, repeats: int
) -> Measurement:
    """Decode every prompt plainly and with every plan, in turn."""
    padding = next((entry.plan.pass_lengths for entry in entries if entry.plan.pass_lengths), None)
    plain = plain_contenders(model, padding)
    plans = [Ours(entry.name, SelfSpeculator(model, entry.plan)) for entry in entries]
    return measure([*plain, *plans], prompts, new_tokens=new_tokens, repeats=repeats)


def rows(measured: Measurement, entries: Sequence[Entry], context: Context) -> list[dict[str, Any]]:
    """The choices, predictions and measurements of every plan for the JSON, the fastest first."""
    longest = max(entry.plan.longest_draft for entry in entries)
    runtime = next(c for c in measured.contenders if isinstance(c, Ours)).spec.runtime
    scores = {score.name: score for score in measured.scores(runtime, gamma=max(longest, 1))}
    ours = [entry.name for entry in entries if entry.method == OURS]
    found = [
        {
            "method": entry.method,
            **scores[entry.name].to_dict(),
            "speedup": scores[entry.name].ratios[measured.baseline].to_dict(),
            "ours_over_it": measured.ratio(ours[0], entry.name).to_dict() if ours and entry.method != OURS else None,
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
    """The fastest measured row of each method, although no method could have known which one that is."""
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: -row["speedup"]["value"]):
        best.setdefault(row["method"], row)
    return list(best.values())


def verdict(row: dict[str, Any]) -> str:
    """Our search against a rival's row: `faster` or `slower` if the 95 % interval excludes 1, else `level`."""
    against = row["ours_over_it"]
    if against is None:
        return ""
    return "faster" if against["low"] > 1 else "slower" if against["high"] < 1 else "level"


def draft_cost(context: Context, skip_set: SkipSet) -> float:
    """The cost of a draft step, as a share of a step that skips nothing."""
    return context.costs.draft_step(skip_set) / context.costs.draft_step(SkipSet())
