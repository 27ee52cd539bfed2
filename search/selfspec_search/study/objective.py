"""Objective: predicted tokens per second, from a replay table and prices, at the best way of drafting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfspec.plan import Figures, Plan, PromptLookup
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.sublayers import SkipSet
from selfspec_search.profile.costs import Costs
from selfspec_search.profile.profile import Profile
from selfspec_search.replay.lookup_table import MAX_NGRAM, MIN_NGRAMS, LookupTable
from selfspec_search.replay.rounds import Drafting, Walk, walk
from selfspec_search.replay.table import Table
from selfspec_search.replay.texts import Text

INDIFFERENCE = 0.002
"""Speedups that differ by less, relatively, count as equal: then the simpler way of drafting is taken."""
NEAR = 0.02
"""Estimates from the first depth alone are about this far off."""
COMBINED = 4
"""So many of the best ways to draft by layers are tried with prompt lookup before them, too."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One draft spec with one way of drafting, and what it is predicted to bring on the texts of a table."""

    draft_spec: DraftSpec
    drafting: Drafting
    figures: Figures

    @property
    def skip_set(self) -> SkipSet:
        return self.draft_spec.skip_set

    @property
    def plan(self) -> Plan:
        """The plan that drafts this way."""
        draft_spec, way = self.draft_spec, self.drafting
        return Plan(
            skip_set=draft_spec.skip_set,
            quantised=draft_spec.quantised,
            draft_vocabulary=draft_spec.vocabulary and draft_spec.vocabulary.code,
            gamma=way.gamma,
            prompt_lookup=way.lookup,
        )

    @property
    def speedup(self) -> float:
        return self.figures.speedup

    def to_dict(self) -> dict[str, Any]:
        """All but the draft spec, ready for JSON."""
        lookup = self.drafting.lookup
        return {
            "gamma": self.drafting.gamma,
            "lookup": lookup.model_dump() if lookup else None,
            **self.figures.model_dump(mode="json"),
        }

    @classmethod
    def from_dict(cls, draft_spec: DraftSpec, data: Mapping[str, Any]) -> Prediction:
        """The inverse of `to_dict`."""
        figures = Figures.model_validate({n: data[n] for n in Figures.model_fields if n in data}, strict=False)
        lookup = PromptLookup(**data["lookup"]) if data.get("lookup") else None
        drafting = Drafting(data["gamma"], lookup)
        return cls(draft_spec=draft_spec, drafting=drafting, figures=figures)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """All that turns a table into seconds.

    Args:
        costs: of steps and rounds of `rows` rows together, at the texts' context.
        lookup: what prompt lookup would have drafted on the same texts; None where it does not take part.
        lookups: the settings of prompt lookup that take part.
    """

    costs: Costs
    rows: int = 1
    lookup: LookupTable | None = None
    lookups: Sequence[PromptLookup] = ()

    @classmethod
    def of(cls, profile: Profile, texts: Sequence[Text], *, lookup: bool = True) -> Prices:
        """Prices for texts like these: costs at the context that decoding them has on average."""
        written = sum(text.written for text in texts)
        context = sum(text.written * (text.prompt + text.written / 2) for text in texts) / written
        prompt = sum(text.prompt for text in texts) / len(texts)
        costs = profile.at(context).model_copy(update={"prefill": profile.at(prompt).prefill})
        table = LookupTable.of(texts, profile.gamma_max) if lookup else None
        return cls(costs=costs, rows=profile.rows, lookup=table)

    def only(self, texts: Sequence[int]) -> Prices:
        """For some of the texts."""
        return self if self.lookup is None else replace(self, lookup=self.lookup.only(texts))

    def with_lookups(self, texts: Sequence[Text]) -> Prices:
        """With the best settings of prompt lookup, one for each least match, judged by lookup alone."""
        if self.lookup is None:
            return self
        best: dict[int, Prediction] = {}
        for prediction in self._lookup_alone(texts):
            assert prediction.drafting.lookup is not None
            least = prediction.drafting.lookup.min_ngram
            if least not in best or prediction.speedup > best[least].speedup * (1 + INDIFFERENCE):
                best[least] = prediction
        return replace(self, lookups=tuple(p.drafting.lookup for p in best.values() if p.drafting.lookup))

    def _lookup_alone(self, texts: Sequence[Text]) -> list[Prediction]:
        lengths = range(1, len(self.costs.rounds))
        every = [PromptLookup(gamma=n, min_ngram=m, max_ngram=MAX_NGRAM) for m in MIN_NGRAMS for n in lengths]
        return predict(Table.empty(texts, 1), self, DraftSpec(), [Drafting(0, lookup) for lookup in every])

    def best_lookup(self, texts: Sequence[Text]) -> Prediction | None:
        """Prompt lookup alone at its best; None where it does not take part."""
        alone = [Drafting(0, lookup) for lookup in self.lookups]
        predictions = predict(Table.empty(texts, 1), self, DraftSpec(), alone) if alone else []
        return max(predictions, key=lambda prediction: prediction.speedup, default=None)


def draft_cost(draft_spec: DraftSpec | SkipSet, prices: Prices) -> float:
    """What a step of the draft costs, as a share of the whole model's."""
    return prices.costs.draft_step(draft_spec) / prices.costs.draft_step(DraftSpec())


def ranked(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Best first; of equals that which skips more."""
    return sorted(predictions, key=lambda p: (-round(p.speedup, 3), -len(p.skip_set)))


def ways_to_draft(table: Table, prices: Prices) -> list[Drafting]:
    """Every draft length. Plain decoding is speedup 1."""
    return [Drafting(gamma) for gamma in range(1, min(table.depths, len(prices.costs.rounds) - 1) + 1)]


def evaluate(table: Table, prices: Prices, draft_spec: DraftSpec) -> list[Prediction]:
    """Every way of drafting by `draft_spec`, then the best of them with prompt lookup before it."""
    by_layers = predict(table, prices, draft_spec, ways_to_draft(table, prices))
    fastest = sorted(by_layers, key=lambda prediction: -prediction.speedup)[:COMBINED]
    combined = [replace(p.drafting, lookup=lookup) for lookup in prices.lookups for p in fastest]
    return by_layers + (predict(table, prices, draft_spec, combined) if combined else [])


def best(table: Table, prices: Prices, draft_spec: DraftSpec) -> Prediction:
    """The fastest way of drafting by `draft_spec`; where it is below 1, plain decoding is faster."""
    return simplest(evaluate(table, prices, draft_spec))


def simplest(predictions: Sequence[Prediction]) -> Prediction:
    """The first that is as good as the fastest: ways come shortest first, with lookup last."""
    fastest = max(prediction.speedup for prediction in predictions)
    return next(p for p in predictions if p.speedup >= fastest * (1 - INDIFFERENCE))


def depths_worth_replaying(estimates: Sequence[Prediction]) -> int:
    """One more than the longest draft that may turn out the best way, judging by estimates of every way.

    With lookup and without, where that comes near the best, the shortest draft counts that is as good as longer ones.
    """
    fastest = max(estimate.speedup for estimate in estimates)
    alike: dict[PromptLookup | None, list[Prediction]] = {}
    for estimate in estimates:
        alike.setdefault(estimate.drafting.lookup, []).append(estimate)
    deepest = 1
    for ways in alike.values():
        fastest_here = max(way.speedup for way in ways)
        if fastest_here >= fastest * (1 - NEAR):
            shortest = min(w.drafting.gamma for w in ways if w.speedup >= fastest_here * (1 - INDIFFERENCE))
            deepest = max(deepest, shortest)
    return deepest + 1


def predict(table: Table, prices: Prices, draft_spec: DraftSpec, ways: Sequence[Drafting]) -> list[Prediction]:
    """Figures for each of these ways of drafting by `draft_spec`.

    Rows of a batch are done when the last one is. When sampling, that is told from each row's expected rounds, which is
    somewhat early.
    """
    walked = walk(table, ways, prices.lookup)
    rounds = walked.visits.sum(axis=2)  # c b
    accepted, drafted = ((walked.visits * x).sum(axis=(1, 2)) for x in (walked.accepted, walked.drafted))
    batches = _batches(table.texts, prices.rows)
    tokens = int(table.written[batches].sum())
    prefill = prices.costs.prefill * len(batches)
    plain = prices.costs.rounds[0] * int(table.written[batches].max(axis=1).sum()) + prefill
    predictions = []
    for index, way in enumerate(ways):
        passes = float(rounds[index][batches].max(axis=1).sum())
        seconds = passes * _pass_seconds(walked, index, way, prices, draft_spec) + prefill
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
    """What plain decoding is predicted to bring."""
    return predict(table, prices, DraftSpec(), [Drafting(0)])[0].figures


def _batches(texts: int, rows: int) -> NDArray[np.int64]:
    """Texts that decode together, one batch a line; texts are used again where they do not fill the last one."""
    return np.arange(-(-texts // rows) * rows).reshape(-1, rows) % texts


def _pass_seconds(walked: Walk, index: int, way: Drafting, prices: Prices, draft_spec: DraftSpec) -> float:
    """Of one round of all rows, drafting included: rows wait for the one that drafts longest."""
    costs, visits = prices.costs, walked.visits[index].ravel()
    drafted, steps = walked.drafted[index].ravel(), walked.steps[index].ravel()
    step = costs.draft_step(draft_spec)
    rounds = costs.round(drafted, way.longest)
    seconds = step * _largest(steps, steps, visits, prices.rows) + _largest(drafted, rounds, visits, prices.rows)
    return seconds + (costs.lookup if way.lookup else 0.0)


def _largest(by: NDArray[np.float64], values: NDArray[np.float64], visits: NDArray[np.float64], rows: int) -> float:
    """What `values` is expected to be in that of `rows` independent rounds in which `by` is the largest."""
    total = visits.sum()
    if rows == 1:
        return float(visits @ values / total)
    order = np.argsort(by, kind="stable")
    below = np.concatenate([[0.0], np.cumsum(visits[order]) / total])
    return float(np.diff(below**rows) @ values[order])
