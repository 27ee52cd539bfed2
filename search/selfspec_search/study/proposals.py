"""Proposals: what a worker tries next, from what is known: given draft specs, seeds, refinements, the sampler's
ideas."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import mean

from selfspec.plan.draft_spec import DraftSpec
from selfspec_search.replay.replay import Replay
from selfspec_search.settings import SearchSettings
from selfspec_search.space import Change, Sublayer, nested, skip_set_of, sublayer_name
from selfspec_search.storage.study_store import Store
from selfspec_search.study.constraints import LimitCheck, Limits
from selfspec_search.study.objective import Prediction, Prices, ranked
from selfspec_search.study.sampler import Sampler

SEED_SHARE = 0.5
"""At most this share of the trials goes to draft specs that are known to be good."""
FULL_TRIALS_FIRST = 5
"""So many trials run whole before any is ended early: they show how far the first depth may be off."""
SENSITIVITY_TEXTS = 8
"""How many texts tell how much each sub-layer matters."""
PARENTS = 5
"""The best so many draft specs tell what a change does."""
MOST_REPEATS = 10
"""A sampler that proposes known draft specs so often in a row has no other idea."""
FEW = 4096
"""Where there are no more draft specs than that, a search may well try every one."""
BESIDE_COPIES = (1, 2, 3, 4)
"""Eighths of the sub-layers, the least important ones, that are skipped where all others are quantised."""


@dataclass(kw_only=True)
class Findings:
    """What the trials of a study found, by any worker.

    Attributes:
        found: predictions of complete trials.
        estimated: what the first depth promised, of complete trials and of those that were ended early.
        largest_gap: between estimate and prediction, relatively, in any complete trial.
    """

    prices: Prices
    limits: Limits = field(default_factory=Limits)
    found: dict[DraftSpec, Prediction] = field(default_factory=dict)
    estimated: dict[DraftSpec, float] = field(default_factory=dict)
    complete: int = 0
    pruned: int = 0
    largest_gap: float = 0.0
    _checks: dict[DraftSpec, LimitCheck] = field(default_factory=dict, init=False)

    @property
    def trials(self) -> int:
        """Trials of the study that ended, by any worker."""
        return self.complete + self.pruned

    def check(self, draft_spec: DraftSpec) -> LimitCheck:
        """The draft spec against the limits; priced once."""
        if draft_spec not in self._checks:
            self._checks[draft_spec] = self.limits.check(draft_spec, self.prices)
        return self._checks[draft_spec]

    def ranking(self) -> list[Prediction]:
        """Predictions of complete trials, best first."""
        return ranked(prediction for prediction in self.found.values() if self.check(prediction.draft_spec).is_feasible)

    @property
    def best(self) -> float | None:
        """The highest predicted speedup within the limits."""
        return max((p.speedup for p in self.found.values() if self.check(p.draft_spec).is_feasible), default=None)

    def is_hopeless(self, estimate: float) -> bool:
        """Whether even the largest gap seen between estimate and truth would leave a trial behind the best.

        Gaps of either sign count: the next one may be as large the other way.
        """
        if len(self.found) < FULL_TRIALS_FIRST:
            return False
        return estimate * (1 + self.largest_gap) < (self.best or 0.0)

    def note(self, draft_spec: DraftSpec, prediction: Prediction | None, estimate: float) -> None:
        """Take in a trial that ended; one that was ended early has no prediction."""
        self.estimated[draft_spec] = estimate
        if prediction is None:
            self.pruned += 1
            return
        self.complete += 1
        self.found[draft_spec] = prediction
        if estimate > 0:
            self.largest_gap = max(self.largest_gap, abs(prediction.speedup / estimate - 1))


class Proposals:
    """What one worker tries next. Every other trial refines the best draft spec by a change or two; the others are the
    sampler's, which works in memory on what all workers found."""

    def __init__(
        self, replay: Replay, findings: Findings, settings: SearchSettings, store: Store, sampler: Sampler, seed: int
    ) -> None:
        self.replay, self.findings, self.settings, self.store = replay, findings, settings, store
        self.space, self._sampler, self._random = store.space, sampler, random.Random(seed)

    def draft_specs(self) -> Iterator[DraftSpec]:
        """Draft specs to try next, none that is known or being tried, until no such one is left.

        First those of workers that died, and the user's own; then those that are known to be good elsewhere.
        """
        if self.findings.trials >= self.settings.trials:
            return
        given = (self.space.nearest(draft_spec) for draft_spec in self.settings.start_from)
        known, turn = self._seeds(), 0
        while True:
            draft_spec = self._new_of(given)
            if draft_spec is None and self.findings.trials < SEED_SHARE * self.settings.trials:
                draft_spec = self._new_of(known)
            if draft_spec is None:
                turn += 1
                draft_spec = (self._refined() if turn % 2 else None) or self._sampled()
            if draft_spec is None:
                return
            yield draft_spec

    def _new_of(self, some: Iterator[DraftSpec]) -> DraftSpec | None:
        """The next of them that is neither known nor being tried."""
        taken = self._taken()
        return next((draft_spec for draft_spec in some if draft_spec not in taken), None)

    def _taken(self) -> set[DraftSpec]:
        return {*self.findings.estimated, *self.store.claimed()}

    def _seeds(self) -> Iterator[DraftSpec]:
        """Those of the space; skip sets that grow by sensitivity, alone and with all else quantised; and at last the
        best skip set that was found, with all else quantised."""
        first, *others = self.space.seeds()
        yield first  # so that even a search without time tries something
        if self.space.skips:
            order = self._by_sensitivity()
            for code in self.space.formats:
                yield from (self.space.quantised(code, skip_set) for skip_set in nested(order, BESIDE_COPIES))
            yield from map(DraftSpec.of, nested(order))
        yield from others
        for code in self.space.formats if self.space.skips else ():
            if best := next((p for p in self.findings.ranking() if p.draft_spec.quantised is None), None):
                yield self.space.quantised(code, best.skip_set)

    def _by_sensitivity(self) -> list[Sublayer]:
        """All sub-layers, first those whose absence costs the least agreement for the time it saves."""
        agreement = self.sensitivity()
        return sorted(
            self.space.sublayers(),
            key=lambda s: (1 - agreement[sublayer_name(s)]) / max(self.findings.prices.costs.saved(s[0]), 1e-12),
        )

    def sensitivity(self) -> dict[str, float]:
        """Agreement of the first drafted token when one sub-layer alone is skipped, by the sub-layer's name.

        Kept in the study: it is the same for all workers.
        """
        if (kept := self.store.get("sensitivity")) is not None:
            return dict(json.loads(kept))
        texts = sorted(range(len(self.replay.texts)), key=lambda index: len(self.replay.texts[index]))
        few = self.replay.only(texts[:: -(-len(texts) // SENSITIVITY_TEXTS)])
        agreement = {
            sublayer_name(sublayer): few.first_depth(skip_set_of([sublayer])).agreement
            for sublayer in self.space.sublayers()
        }
        self.store.publish("sensitivity", json.dumps(agreement).encode())
        return agreement

    def _refined(self) -> DraftSpec | None:
        """The best draft spec with one choice changed, or two: that which promises most of those that were not tried
        yet.

        What a change did to one of the best draft specs it may do to the best one, and two changes what each did.
        """
        taken, parents = self._taken(), [prediction.draft_spec for prediction in self.findings.ranking()[:PARENTS]]
        if not parents:
            return None
        effects = self._effects(parents)
        known = {change: effects.get(change) for change in self.space.changes(parents[0])}
        ones = [(effect or 1.0 + self._random.uniform(0, 1e-6), (change,)) for change, effect in known.items()]
        seen = [(change, effect) for change, effect in known.items() if effect]
        two = [(a * b, (one, other)) for (one, a), (other, b) in combinations(seen, 2) if one[0] != other[0]]
        for _, changes in sorted([*ones, *two], key=lambda pair: -pair[0]):
            draft_spec = self.space.changed(parents[0], *changes)
            if draft_spec not in taken and self.findings.check(draft_spec).is_feasible:
                return draft_spec
        return None

    def _effects(self, parents: Sequence[DraftSpec]) -> dict[Change, float]:
        """By change: what it did to the estimate, as a factor."""
        factors: dict[Change, list[float]] = {}
        for parent in parents:
            for change in self.space.changes(parent):
                after = self.findings.estimated.get(self.space.changed(parent, change), 0.0)
                if after > 0:
                    factors.setdefault(change, []).append(after / self.findings.estimated[parent])
        return {key: mean(values) for key, values in factors.items()}

    def _sampled(self) -> DraftSpec | None:
        """The sampler's next idea; any draft spec that was not tried, where it has no new one; None where all were."""
        taken = self._taken()
        for _ in range(MOST_REPEATS):
            draft_spec = self._sampler.propose()
            if draft_spec not in taken:
                return draft_spec
            self._sampler.decline(draft_spec)
        if self.space.size <= FEW:
            left = [draft_spec for draft_spec in self.space.every() if draft_spec not in taken]
            return self._random.choice(left) if left else None
        return next(draft_spec for draft_spec in self._drawn() if draft_spec not in taken)

    def _drawn(self) -> Iterator[DraftSpec]:
        choices = self.space.choices.items()
        while True:
            yield self.space.from_params({name: self._random.choice(some) for name, some in choices})
