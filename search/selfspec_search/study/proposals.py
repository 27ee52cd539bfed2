"""Proposals: what a worker tries next: the user's draft specs, known good draft specs, refinements, the sampler's."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import mean

from selfspec.plan.draft_spec import DraftSpec
from selfspec_search.budget import Budget
from selfspec_search.replay.replay import Replay
from selfspec_search.settings import SearchSettings
from selfspec_search.space import Change, Sublayer, nested, skip_set_of, sublayer_name, sublayers
from selfspec_search.storage.study_store import Store
from selfspec_search.study.constraints import LimitCheck, Limits
from selfspec_search.study.objective import Prediction, Prices, ranked
from selfspec_search.study.race import POSITIONS, few_texts
from selfspec_search.study.sampler import Sampler

SEED_SHARE = 0.5
"""Share of the trials: the most that try known good draft specs."""
FULL_TRIALS_FIRST = 5
"""Trials: the number of complete trials before any trial is pruned. They show the error of first-depth estimates."""
LEAST_SENSITIVITY_POSITIONS = 64
"""Tokens: the fewest on which the sensitivity to a sub-layer is measured, however little time there is."""
REFINED_SPECS = 5
"""Draft specs: the best ones, which show the effect of a change."""
MOST_REPEATS = 10
"""Proposals: after this many known draft specs in a row, the sampler counts as exhausted."""
ENUMERABLE_SPECS = 4096
"""Draft specs: the largest space whose untried draft specs are listed."""
SKIPPED_EIGHTHS_IF_QUANTISED = (1, 2, 3, 4)
"""Eighths of the sub-layers, the least important first, that seeds skip while all other sub-layers are quantised."""


@dataclass(kw_only=True)
class Findings:
    """The findings of all workers of a study."""

    prices: Prices
    limits: Limits = field(default_factory=Limits)
    found: dict[DraftSpec, Prediction] = field(default_factory=dict)  # of complete trials
    estimated: dict[DraftSpec, float] = field(default_factory=dict)  # speedups by the first depth, of all trials
    complete: int = 0
    pruned: int = 0
    largest_gap: float = 0.0  # the largest relative difference between estimate and prediction
    _checks: dict[DraftSpec, LimitCheck] = field(default_factory=dict, init=False)

    @property
    def trials(self) -> int:
        """Finished trials of the study, complete or pruned."""
        return self.complete + self.pruned

    def check(self, draft_spec: DraftSpec) -> LimitCheck:
        """Compare a draft spec with the limits; the result is computed once."""
        if draft_spec not in self._checks:
            self._checks[draft_spec] = self.limits.check(draft_spec, self.prices)
        return self._checks[draft_spec]

    def ranking(self) -> list[Prediction]:
        """Feasible predictions of complete trials, the best first."""
        return ranked(prediction for prediction in self.found.values() if self.check(prediction.draft_spec).is_feasible)

    @property
    def best(self) -> float | None:
        """The highest predicted speedup within the limits."""
        return max((prediction.speedup for prediction in self.ranking()), default=None)

    def is_hopeless(self, estimate: float) -> bool:
        """Whether a trial with this estimate stays below the best even after the largest gap so far.

        Gaps of either sign count, since the next gap may have the other sign.
        """
        if len(self.found) < FULL_TRIALS_FIRST:
            return False
        return estimate * (1 + self.largest_gap) < (self.best or 0.0)

    def add(self, draft_spec: DraftSpec, prediction: Prediction | None, estimate: float) -> None:
        """Add a finished trial; `prediction` is None if the trial was pruned."""
        self.estimated[draft_spec] = estimate
        if prediction is None:
            self.pruned += 1
            return
        self.complete += 1
        self.found[draft_spec] = prediction
        if estimate > 0:
            self.largest_gap = max(self.largest_gap, abs(prediction.speedup / estimate - 1))


class Proposals:
    """Draft specs that a worker tries next. After the seeds, refinements of the best draft spec and proposals of the
    sampler alternate. Both use the findings of all workers."""

    def __init__(
        self,
        replay: Replay,
        findings: Findings,
        settings: SearchSettings,
        store: Store,
        sampler: Sampler,
        seed: int,
        budget: Budget,
        on_sensitivity: Callable[[int, int], None],
    ) -> None:
        self.replay, self.findings, self.settings, self.store = replay, findings, settings, store
        self.budget, self.on_sensitivity = budget, on_sensitivity
        self.space, self._sampler, self._random = store.space, sampler, random.Random(seed)

    def draft_specs(self) -> Iterator[DraftSpec]:
        """Untried draft specs, until none is left: the user's own, then seeds, then refinements and the sampler's."""
        if self.findings.trials >= self.settings.trials:
            return
        given = (self.space.nearest(draft_spec) for draft_spec in self.settings.start_from)
        seeds, turn = self._seeds(), 0
        while True:
            draft_spec = self._untried(given)
            if draft_spec is None and self.findings.trials < SEED_SHARE * self.settings.trials:
                draft_spec = self._untried(seeds)
            if draft_spec is None:
                turn += 1
                draft_spec = (self._refined() if turn % 2 else None) or self._sampled()
            if draft_spec is None:
                return
            yield draft_spec

    def _untried(self, draft_specs: Iterator[DraftSpec]) -> DraftSpec | None:
        """The next draft spec that no worker has tried or is trying."""
        taken = self._taken()
        return next((draft_spec for draft_spec in draft_specs if draft_spec not in taken), None)

    def _taken(self) -> set[DraftSpec]:
        """Draft specs that are not proposed: those of all workers so far, and the whole model, which saves nothing."""
        return {DraftSpec(), *self.findings.estimated, *self.store.claimed()}

    def _seeds(self) -> Iterator[DraftSpec]:
        """Known good draft specs: the space's seeds, skip sets that grow by sensitivity, and the best skip set found.

        Where a format is offered, skip sets are also tried with all other sub-layers quantised.
        """
        first, *others = self.space.seeds()
        yield first  # before measuring sensitivity, so that a search without time tries one draft spec
        if self.space.skips:
            order = self._by_sensitivity()
            for code in self.space.formats:
                yield from (self.space.quantised(code, s) for s in nested(order, SKIPPED_EIGHTHS_IF_QUANTISED))
            yield from map(DraftSpec.of, nested(order))
        yield from others
        for code in self.space.formats if self.space.skips else ():
            if best := next((p for p in self.findings.ranking() if p.draft_spec.quantised is None), None):
                yield self.space.quantised(code, best.skip_set)

    def _by_sensitivity(self) -> list[Sublayer]:
        """All sub-layers, sorted by the agreement that skipping costs for the time that skipping saves."""
        agreement, costs = self.sensitivity(), self.findings.prices.costs
        return sorted(
            sublayers(self.space.num_layers),
            key=lambda s: (1 - agreement[sublayer_name(s)]) / max(costs.saved(s[0]), 1e-12),
        )

    def sensitivity(self) -> dict[str, float]:
        """Agreement of the first drafted token when one sub-layer is skipped, by the sub-layer's name.

        The study stores the result for all workers.
        """
        if (kept := self.store.get("sensitivity")) is not None:
            return dict(json.loads(kept))
        every, few = sublayers(self.space.num_layers), self._sensitivity_replay()
        agreement = {}
        for done, sublayer in enumerate(every, start=1):
            agreement[sublayer_name(sublayer)] = few.first_depth(skip_set_of([sublayer])).agreement
            self.on_sensitivity(done, len(every))
        self.store.publish("sensitivity", json.dumps(agreement).encode())
        return agreement

    def _sensitivity_replay(self) -> Replay:
        """A replay of as many positions as the budget allows to replay once for each sub-layer."""
        texts, positions = self.replay.texts, POSITIONS
        if self.budget.is_limited:
            chosen = few_texts(texts, LEAST_SENSITIVITY_POSITIONS)
            start, timed = time.monotonic(), sum(texts[index].written for index in chosen)
            self.replay.only(chosen).first_depth(DraftSpec())
            per_position = (time.monotonic() - start) / timed
            affordable = self.budget.share("sensitivity") / (2 * self.space.num_layers) / per_position
            if affordable < positions:
                positions = max(LEAST_SENSITIVITY_POSITIONS, int(affordable))
                self.budget.cut(f"sensitivity to sub-layers was measured on {positions} tokens")
        return self.replay.only(few_texts(texts, positions))

    def _refined(self) -> DraftSpec | None:
        """The best draft spec with one or two choices changed: the most promising untried and feasible change.

        A change is assumed to have the same effect on the best draft spec as on other good draft specs. The effects of
        two changes multiply.
        """
        taken, parents = self._taken(), [p.draft_spec for p in self.findings.ranking()[:REFINED_SPECS]]
        if not parents:
            return None
        effects, changes = self._effects(parents), self.space.changes(parents[0])
        known = [(change, effects[change]) for change in changes if change in effects]
        ones = [(effects.get(change) or 1.0 + self._random.uniform(0, 1e-6), (change,)) for change in changes]
        twos = [(a * b, (one, other)) for (one, a), (other, b) in combinations(known, 2) if one[0] != other[0]]
        for _, changed in sorted([*ones, *twos], key=lambda pair: -pair[0]):
            draft_spec = self.space.changed(parents[0], *changed)
            if draft_spec not in taken and self.findings.check(draft_spec).is_feasible:
                return draft_spec
        return None

    def _effects(self, parents: Sequence[DraftSpec]) -> dict[Change, float]:
        """By change: the factor by which the change multiplies the estimate, averaged over the parents."""
        factors: dict[Change, list[float]] = {}
        for parent in parents:
            for change in self.space.changes(parent):
                after = self.findings.estimated.get(self.space.changed(parent, change), 0.0)
                if after > 0:
                    factors.setdefault(change, []).append(after / self.findings.estimated[parent])
        return {change: mean(values) for change, values in factors.items()}

    def _sampled(self) -> DraftSpec | None:
        """The sampler's next untried proposal, or a random untried draft spec; None if all were tried."""
        taken = self._taken()
        for _ in range(MOST_REPEATS):
            draft_spec = self._sampler.propose()
            if draft_spec not in taken:
                return draft_spec
            self._sampler.decline(draft_spec)
        if self.space.size <= ENUMERABLE_SPECS:
            left = [draft_spec for draft_spec in self.space.every() if draft_spec not in taken]
            return self._random.choice(left) if left else None
        choices = self.space.choices.items()
        while True:
            draft_spec = self.space.from_params({name: self._random.choice(some) for name, some in choices})
            if draft_spec not in taken:
                return draft_spec
