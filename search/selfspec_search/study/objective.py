"""Objective: predicted tokens per second of a draft spec at its best way of drafting, from a replay table and costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.lookup import PromptLookup
from selfspec.plan.plan import Plan
from selfspec.plan.provenance import Figures
from selfspec.plan.sublayers import SkipSet
from selfspec_search.profile.costs import Costs
from selfspec_search.profile.profile import Profile
from selfspec_search.replay.lookup_table import MAX_NGRAM, MIN_NGRAMS, LookupTable
from selfspec_search.replay.rounds import Drafting, Rounds, rounds_of
from selfspec_search.replay.table import Table
from selfspec_search.replay.texts import Text

INDIFFERENCE = 0.002
"""Share of a speedup: smaller differences are ignored, and the simpler way of drafting is chosen."""
ESTIMATE_ERROR = 0.02
"""Share of a speedup: the usual error of estimates from the first depth."""
WAYS_WITH_LOOKUP = 4
"""Ways of drafting: the fastest draft lengths that are also tried with prompt lookup."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A draft spec, a way of drafting, and the predicted figures on the texts of a table."""

    draft_spec: DraftSpec
    drafting: Drafting
    figures: Figures

    @property
    def skip_set(self) -> SkipSet:
        return self.draft_spec.skip_set

    @property
    def plan(self) -> Plan:
        """The plan that drafts this way."""
        draft_spec = self.draft_spec
        return Plan(
            skip_set=draft_spec.skip_set,
            quantised=draft_spec.quantised,
            draft_vocabulary=draft_spec.vocabulary and draft_spec.vocabulary.code,
            gamma=self.drafting.gamma,
            prompt_lookup=self.drafting.lookup,
        )

    @property
    def speedup(self) -> float:
        return self.figures.speedup

    def to_dict(self) -> dict[str, Any]:
        """The way of drafting and the figures as JSON can hold them."""
        lookup = self.drafting.lookup
        way = {"gamma": self.drafting.gamma, "lookup": lookup.model_dump() if lookup else None}
        return {**way, **self.figures.model_dump(mode="json")}

    @classmethod
    def from_dict(cls, draft_spec: DraftSpec, data: Mapping[str, Any]) -> Prediction:
        """The inverse of `to_dict`."""
        figures = Figures.model_validate({n: data[n] for n in Figures.model_fields if n in data}, strict=False)
        lookup = PromptLookup(**data["lookup"]) if data.get("lookup") else None
        return cls(draft_spec=draft_spec, drafting=Drafting(data["gamma"], lookup), figures=figures)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What turns a table into seconds."""

    costs: Costs  # of `rows` rows together, at the texts' average context
    rows: int = 1
    lookup: LookupTable | None = None  # of the same texts; None without prompt lookup
    lookups: Sequence[PromptLookup] = ()  # settings of prompt lookup to combine with layer skipping

    @classmethod
    def of(cls, profile: Profile, texts: Sequence[Text], *, lookup: bool = True) -> Prices:
        """Costs at the average context while the texts are written, and the texts' lookup table."""
        written = sum(text.written for text in texts)
        context = sum(text.written * (text.prompt + text.written / 2) for text in texts) / written
        prompt = sum(text.prompt for text in texts) / len(texts)
        costs = profile.at(context).model_copy(update={"prefill": profile.at(prompt).prefill})
        table = LookupTable.of(texts, profile.gamma_max) if lookup else None
        return cls(costs=costs, rows=profile.rows, lookup=table)

    def only(self, texts: Sequence[int]) -> Prices:
        """The prices for some of the texts."""
        return self if self.lookup is None else replace(self, lookup=self.lookup.only(texts))

    def with_lookups(self, texts: Sequence[Text]) -> Prices:
        """With the best settings of prompt lookup for each minimum match length, compared without layer skipping."""
        if self.lookup is None:
            return self
        lengths, best = range(1, len(self.costs.rounds)), dict[int, Prediction]()
        lookups = [PromptLookup(gamma=n, min_ngram=m, max_ngram=MAX_NGRAM) for m in MIN_NGRAMS for n in lengths]
        for lookup, prediction in zip(lookups, self._lookup_alone(texts, lookups), strict=True):
            known = best.setdefault(lookup.min_ngram, prediction)
            if prediction.speedup > known.speedup * (1 + INDIFFERENCE):
                best[lookup.min_ngram] = prediction
        return replace(self, lookups=tuple(p.drafting.lookup for p in best.values() if p.drafting.lookup))

    def best_lookup(self, texts: Sequence[Text]) -> Prediction | None:
        """The prediction of the best prompt lookup without layer skipping; None without prompt lookup."""
        return max(self._lookup_alone(texts, self.lookups), key=lambda prediction: prediction.speedup, default=None)

    def _lookup_alone(self, texts: Sequence[Text], lookups: Sequence[PromptLookup]) -> list[Prediction]:
        return predict(Table.empty(texts, 1), self, DraftSpec(), [Drafting(0, lookup) for lookup in lookups])


def ceiling(costs: Costs) -> float:
    """The most that any draft can gain: all drafted tokens are accepted, and the draft skips every sub-layer."""
    step = costs.draft_step(SkipSet(attn=range(costs.num_layers), mlp=range(costs.num_layers)))
    return max((n + 1) * costs.rounds[0] / (n * step + seconds) for n, seconds in enumerate(costs.rounds) if n)


def ranked(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Predictions sorted by speedup, the highest first. Of equal speedups, the larger skip set comes first.

    The whole model as its own draft is left out: that draft saves nothing, so only noise could make it faster.
    """
    drafts = (prediction for prediction in predictions if prediction.draft_spec != DraftSpec())
    return sorted(drafts, key=lambda p: (-round(p.speedup, 3), -len(p.skip_set)))


def ways_to_draft(table: Table, prices: Prices) -> list[Drafting]:
    """All draft lengths that were replayed and have costs, without prompt lookup."""
    return [Drafting(gamma) for gamma in range(1, min(table.depths, len(prices.costs.rounds) - 1) + 1)]


def evaluate(table: Table, prices: Prices, draft_spec: DraftSpec) -> list[Prediction]:
    """Predictions for all draft lengths, then for the fastest draft lengths with prompt lookup."""
    by_layers = predict(table, prices, draft_spec, ways_to_draft(table, prices))
    fastest = sorted(by_layers, key=lambda prediction: -prediction.speedup)[:WAYS_WITH_LOOKUP]
    combined = [replace(p.drafting, lookup=lookup) for lookup in prices.lookups for p in fastest]
    return by_layers + predict(table, prices, draft_spec, combined)


def best(table: Table, prices: Prices, draft_spec: DraftSpec) -> Prediction:
    """The fastest way of drafting with `draft_spec`. Below a speedup of 1, plain decoding is faster."""
    return simplest(evaluate(table, prices, draft_spec))


def simplest(predictions: Sequence[Prediction]) -> Prediction:
    """The first prediction about as fast as the fastest: short drafts come first, prompt lookup last."""
    fastest = max(prediction.speedup for prediction in predictions)
    return next(p for p in predictions if p.speedup >= fastest * (1 - INDIFFERENCE))


def depths_worth_replaying(estimates: Sequence[Prediction]) -> int:
    """One more than the longest draft that may be the best way, from estimates of all ways.

    Ways with the same prompt lookup compete. Where their best is close to the overall best, their shortest draft that
    is about as fast counts.
    """
    fastest = max(estimate.speedup for estimate in estimates)
    by_lookup: dict[PromptLookup | None, list[Prediction]] = {}
    for estimate in estimates:
        by_lookup.setdefault(estimate.drafting.lookup, []).append(estimate)
    deepest = 1
    for ways in by_lookup.values():
        fastest_here = max(way.speedup for way in ways)
        if fastest_here >= fastest * (1 - ESTIMATE_ERROR):
            deepest = max(
                deepest, min(w.drafting.gamma for w in ways if w.speedup >= fastest_here * (1 - INDIFFERENCE))
            )
    return deepest + 1


def predict(table: Table, prices: Prices, draft_spec: DraftSpec, ways: Sequence[Drafting]) -> list[Prediction]:
    """Predicted figures of `draft_spec` for each way of drafting.

    A batch ends with its last row. For sampling, the end is predicted from each row's expected rounds, which is
    slightly too early.
    """
    if not ways:
        return []
    replayed = rounds_of(table, ways, prices.lookup)
    rounds = replayed.visits.sum(axis=2)  # c b
    accepted, drafted = ((replayed.visits * x).sum(axis=(1, 2)) for x in (replayed.accepted, replayed.drafted))
    # Texts that decode together, a batch in each row; the first texts fill up the last batch.
    batches = np.arange(-(-table.texts // prices.rows) * prices.rows).reshape(-1, prices.rows) % table.texts
    tokens = int(table.written[batches].sum())
    prefill = prices.costs.prefill * len(batches)
    plain = prices.costs.rounds[0] * int(table.written[batches].max(axis=1).sum()) + prefill
    predictions = []
    for index, way in enumerate(ways):
        passes = float(rounds[index][batches].max(axis=1).sum())
        seconds = passes * _round_seconds(replayed, index, way, prices, draft_spec) + prefill
        figures = Figures(
            tokens_per_round=int(table.written.sum()) / float(rounds[index].sum()),
            acceptance_rate=float(accepted[index] / drafted[index]) if drafted[index] else 0.0,
            tokens_per_second=tokens / seconds,
            speedup=plain / seconds,
            texts=table.texts,
        )
        predictions.append(Prediction(draft_spec=draft_spec, drafting=way, figures=figures))
    return predictions


def plain_figures(table: Table, prices: Prices) -> Figures:
    """Predicted figures of plain decoding."""
    return predict(table, prices, DraftSpec(), [Drafting(0)])[0].figures


def _round_seconds(rounds: Rounds, index: int, way: Drafting, prices: Prices, draft_spec: DraftSpec) -> float:
    """Expected seconds of one round of all rows, drafting included: all rows wait for the longest draft."""
    costs, visits = prices.costs, rounds.visits[index].ravel()
    drafted, steps = rounds.drafted[index].ravel(), rounds.steps[index].ravel()
    drafting = costs.draft_step(draft_spec) * _of_largest(steps, steps, visits, prices.rows)
    others = _of_largest(drafted, costs.round(drafted, way.longest), visits, prices.rows)
    return drafting + others + (costs.lookup if way.lookup else 0.0)


def _of_largest(by: NDArray[np.float64], values: NDArray[np.float64], visits: NDArray[np.float64], rows: int) -> float:
    """The expected value in that round, of `rows` independent rounds, in which `by` is largest."""
    total = visits.sum()
    if rows == 1:
        return float(visits @ values / total)
    order = np.argsort(by, kind="stable")
    below = np.concatenate([[0.0], np.cumsum(visits[order]) / total])
    return float(np.diff(below**rows) @ values[order])
