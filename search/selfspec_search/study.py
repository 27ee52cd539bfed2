"""Study: Optuna over the sub-layers, each trial a replay, ended after its first depth where that looks hopeless."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, count
from statistics import mean
from typing import Any

from selfspec.skip_set import SkipSet
from selfspec_search.objective import (
    Prediction,
    Prices,
    best,
    depths_worth_replaying,
    draft_cost,
    evaluate,
    is_cheap,
)
from selfspec_search.replay import Replay
from selfspec_search.sampler import Sampler
from selfspec_search.settings import SearchSettings
from selfspec_search.space import (
    Sublayer,
    every_set,
    flipped,
    nested,
    seeds,
    skip_set_of,
    sublayer_name,
    sublayers,
)
from selfspec_search.store import Running, Store, StoredTrial
from selfspec_search.table import Table

SEED_SHARE = 0.5
"""At most this share of the trials goes to sets that are known to be good."""
FULL_TRIALS_FIRST = 5
"""So many trials run whole before any is ended early: they show how far the first depth may be off."""
SENSITIVITY_TEXTS = 8
"""How many texts tell how much each sub-layer matters."""
PARENTS = 5
"""The best so many sets tell what a flip does."""
MOST_REPEATS = 10
"""A sampler that proposes known sets so often in a row has no other idea."""
FEW_SUBLAYERS = 12
"""With so many, a search may well try every set there is."""


@dataclass
class Study:
    """A worker's trials in one search. Every other trial refines the best set by a flip or two; the others are the
    sampler's, which works in memory on what all workers found."""

    replay: Replay
    prices: Prices
    settings: SearchSettings
    store: Store
    on_trial: Callable[[int, float | None], None] = lambda done, best: None
    found: dict[SkipSet, Prediction] = field(default_factory=dict)
    estimated: dict[SkipSet, float] = field(default_factory=dict)
    complete: int = 0
    pruned: int = 0
    interrupted: bool = False
    largest_gap: float = 0.0

    def __post_init__(self) -> None:
        self.num_layers = self.prices.costs.num_layers
        news = self.store.news()
        # Workers that join, perhaps all at once, go their own ways.
        seed = self.settings.seed + (0 if self.store.created else len(news) + os.getpid())
        self._random = random.Random(seed)
        self._sampler = Sampler(self.settings.sampler, seed, self.num_layers)
        self._learn(news)

    @property
    def trials(self) -> int:
        """Trials of the study that ended, by any worker."""
        return self.complete + self.pruned

    def draft_cost(self, skip_set: SkipSet) -> float:
        """What a step of the draft costs, as a share of the whole model's."""
        return draft_cost(skip_set, self.prices)

    def is_feasible(self, skip_set: SkipSet) -> bool:
        """Whether a draft is cheap enough."""
        return is_cheap(skip_set, self.prices, self.settings.max_draft_cost)

    def ranking(self) -> list[Prediction]:
        """Predictions of complete trials, best first; of equals the smaller draft."""
        feasible = [prediction for prediction in self.found.values() if self.is_feasible(prediction.skip_set)]
        return sorted(feasible, key=lambda p: (-round(p.speedup, 3), -len(p.skip_set)))

    def run(self) -> None:
        """Run trials until there were enough, time is up, or the user interrupts; what was found until then stays."""
        deadline = time.monotonic() + (float("inf") if self.settings.timeout is None else self.settings.timeout)
        try:
            for skip_set in self._proposals():
                self._try(skip_set)
                self._learn(self.store.news())
                self.on_trial(self.trials, self._best)
                if self.trials >= self.settings.trials or time.monotonic() > deadline:
                    break
        except KeyboardInterrupt:
            self.interrupted = True
            self._learn(self.store.news())  # a trial may have ended and not have been noted

    @property
    def _best(self) -> float | None:
        return max((p.speedup for p in self.found.values() if self.is_feasible(p.skip_set)), default=None)

    # --- What to try ---

    def _proposals(self) -> Iterator[SkipSet]:
        """Skip sets to try next, none that is known or being tried, until no such set is left.

        First those of workers that died, and the user's own; then those that are known to be good elsewhere.
        """
        if self.trials >= self.settings.trials:
            return
        given, known, turn = iter(self.settings.start_from), self._seeds(), 0
        while True:
            skip_set = self.store.waiting() or self._new_of(given)
            if skip_set is None and self.trials < SEED_SHARE * self.settings.trials:
                skip_set = self._new_of(known)
            if skip_set is None:
                turn += 1
                skip_set = (self._refined() if turn % 2 else None) or self._sampled()
            if skip_set is None:
                return
            yield skip_set

    def _new_of(self, some: Iterator[SkipSet]) -> SkipSet | None:
        """The next of them that is neither known nor being tried."""
        taken = self._taken()
        return next((skip_set for skip_set in some if skip_set not in taken), None)

    def _taken(self) -> set[SkipSet]:
        return {*self.found, *self.estimated, *self.store.claimed()}

    def _seeds(self) -> Iterator[SkipSet]:
        fixed = list(seeds(self.num_layers))
        yield from fixed[:1]  # so that even a search without time tries something
        yield from nested(self._by_sensitivity())
        yield from fixed[1:]

    def _by_sensitivity(self) -> list[Sublayer]:
        """All sub-layers, first those whose absence costs the least agreement for the time it saves."""
        agreement = self.sensitivity()
        return sorted(
            sublayers(self.num_layers),
            key=lambda s: (1 - agreement[sublayer_name(s)]) / max(self.prices.costs.saved(s[0]), 1e-12),
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
            for sublayer in sublayers(self.num_layers)
        }
        self.store.publish("sensitivity", json.dumps(agreement).encode())
        return agreement

    def _refined(self) -> SkipSet | None:
        """The best set with one sub-layer flipped, or two: that which promises most of those that were not tried yet.

        What a flip did to one of the best sets it may do to the best one, and two flips what each did.
        """
        taken, parents = self._taken(), [prediction.skip_set for prediction in self.ranking()[:PARENTS]]
        if not parents:
            return None
        effects = self._effects(parents)
        best, every = parents[0], sublayers(self.num_layers)
        known = {sublayer: effects.get((sublayer, sublayer in best)) for sublayer in every}
        ones = [(effect or 1.0 + self._random.uniform(0, 1e-6), (sublayer,)) for sublayer, effect in known.items()]
        two = [(a * b, (one, other)) for (one, a), (other, b) in combinations(known.items(), 2) if a and b]
        for _, flips in sorted([*ones, *two], key=lambda pair: -pair[0]):
            skip_set = flipped(best, *flips)
            if skip_set not in taken and self.is_feasible(skip_set):
                return skip_set
        return None

    def _effects(self, parents: Sequence[SkipSet]) -> dict[tuple[Sublayer, bool], float]:
        """By a sub-layer and whether it was skipped before: what flipping it did to the estimate, as a factor."""
        factors: dict[tuple[Sublayer, bool], list[float]] = {}
        for parent in parents:
            for sublayer in sublayers(self.num_layers):
                after = self.estimated.get(flipped(parent, sublayer), 0.0)
                if after > 0:
                    factors.setdefault((sublayer, sublayer in parent), []).append(after / self.estimated[parent])
        return {key: mean(values) for key, values in factors.items()}

    def _sampled(self) -> SkipSet | None:
        """The sampler's next idea; any set that was not tried, where it has no new one; None where all were."""
        taken = self._taken()
        for _ in range(MOST_REPEATS):
            skip_set = self._sampler.propose()
            if skip_set not in taken:
                return skip_set
            self._sampler.decline(skip_set)
        every = sublayers(self.num_layers)
        if len(every) <= FEW_SUBLAYERS:
            left = [skip_set for skip_set in every_set(self.num_layers) if skip_set not in taken]
            return self._random.choice(left) if left else None
        drawn = (self._random.sample(every, self._random.randint(0, len(every))) for _ in count())
        return next(skip_set for skip_set in map(skip_set_of, drawn) if skip_set not in taken)

    # --- Trying it ---

    def _try(self, skip_set: SkipSet) -> None:
        worker = f"{socket.gethostname()}:{os.getpid()}"
        record: dict[str, Any] = {"draft_cost": self.draft_cost(skip_set), "worker": worker}
        if (running := self.store.claim(skip_set)) is None:
            return  # another worker was first: its result is among the next news
        with running:
            if self.is_feasible(skip_set):
                self._replay(skip_set, running, record)
            else:
                running.prune(0.0, {**record, "estimate": 0.0}, self._constraints(skip_set))

    def _replay(self, skip_set: SkipSet, running: Running, record: dict[str, Any]) -> None:
        start, first_depth, estimate = time.monotonic(), None, 0.0

        def how_deep(first: Table) -> int:
            nonlocal first_depth, estimate
            estimates = evaluate(first, self.prices, skip_set)
            first_depth, estimate = first, max(way.speedup for way in estimates)
            return 0 if self._is_hopeless(estimate) else depths_worth_replaying(estimates)

        table = self.replay.run(skip_set, how_deep)
        assert first_depth is not None
        kept = table or first_depth.shallow(1)
        record |= {
            "estimate": estimate,
            "agreement": first_depth.agreement,
            "seconds": time.monotonic() - start,
            "table": b64encode(kept.to_bytes()).decode(),
        }
        if table is None:
            running.prune(estimate, record, self._constraints(skip_set))
            return
        prediction = best(table, self.prices, skip_set)
        record["prediction"] = prediction.to_dict()
        running.finish(prediction.speedup, record, self._constraints(skip_set))

    def _is_hopeless(self, estimate: float) -> bool:
        """Whether even the largest gap seen between estimate and truth would leave a trial behind the best.

        Gaps of either sign count: the next one may be as large the other way.
        """
        if len(self.found) < FULL_TRIALS_FIRST:
            return False
        return estimate * (1 + self.largest_gap) < (self._best or 0.0)

    # --- What is known ---

    def _learn(self, news: Iterable[StoredTrial]) -> None:
        """Take in what this worker, others and earlier runs found."""
        for trial in news:
            self._note(trial.skip_set, prediction_of(trial), trial.record["estimate"])

    def _note(self, skip_set: SkipSet, prediction: Prediction | None, estimate: float) -> None:
        self.estimated[skip_set] = estimate
        if prediction is None:
            self.pruned += 1
        else:
            self.complete += 1
            self.found[skip_set] = prediction
            if estimate > 0:
                self.largest_gap = max(self.largest_gap, abs(prediction.speedup / estimate - 1))
        value = None if prediction is None else prediction.speedup
        self._sampler.tell(skip_set, value, estimate=estimate, constraints=self._constraints(skip_set))

    def _constraints(self, skip_set: SkipSet) -> dict[str, float]:
        """Feasible if at most 0."""
        limit = self.settings.max_draft_cost
        return {} if limit is None else {"draft_cost": self.draft_cost(skip_set) - limit}


def prediction_of(trial: StoredTrial) -> Prediction | None:
    """What a trial of a study predicted; None if it was pruned."""
    if trial.value is None:
        return None
    return Prediction.from_dict(trial.skip_set, trial.record["prediction"])
