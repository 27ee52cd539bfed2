"""Study: Optuna over what becomes of sub-layers, each trial a replay, ended after one depth where it looks hopeless."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import mean
from typing import Any

from selfspec.recipe import Recipe
from selfspec_search.limits import Limits
from selfspec_search.objective import (
    Prediction,
    Prices,
    best,
    depths_worth_replaying,
    evaluate,
    ranked,
)
from selfspec_search.replay import Replay
from selfspec_search.sampler import Sampler
from selfspec_search.settings import SearchSettings
from selfspec_search.space import Change, Sublayer, nested, skip_set_of, sublayer_name
from selfspec_search.storage.study_store import Running, Store, StoredTrial
from selfspec_search.table import Table

SEED_SHARE = 0.5
"""At most this share of the trials goes to recipes that are known to be good."""
FULL_TRIALS_FIRST = 5
"""So many trials run whole before any is ended early: they show how far the first depth may be off."""
SENSITIVITY_TEXTS = 8
"""How many texts tell how much each sub-layer matters."""
PARENTS = 5
"""The best so many recipes tell what a change does."""
MOST_REPEATS = 10
"""A sampler that proposes known recipes so often in a row has no other idea."""
FEW = 4096
"""Where there are no more recipes than that, a search may well try every one."""
BESIDE_COPIES = (1, 2, 3, 4)
"""Eighths of the sub-layers, the least important ones, that are skipped where all others are quantised."""


@dataclass
class Study:
    """A worker's trials in one search. Every other trial refines the best recipe by a change or two; the others are the
    sampler's, which works in memory on what all workers found."""

    replay: Replay
    prices: Prices
    settings: SearchSettings
    store: Store
    limits: Limits = field(default_factory=Limits)
    on_trial: Callable[[int, float | None], None] = lambda done, best: None
    found: dict[Recipe, Prediction] = field(default_factory=dict)
    estimated: dict[Recipe, float] = field(default_factory=dict)
    complete: int = 0
    pruned: int = 0
    interrupted: bool = False
    largest_gap: float = 0.0

    def __post_init__(self) -> None:
        self.space = self.store.space
        news = self.store.news()
        # Workers that join, perhaps all at once, go their own ways.
        seed = self.settings.seed + (0 if self.store.created else len(news) + os.getpid())
        self._random = random.Random(seed)
        self._sampler = Sampler(self.settings.sampler, seed, self.space)
        self._learn(news)

    @property
    def trials(self) -> int:
        """Trials of the study that ended, by any worker."""
        return self.complete + self.pruned

    def is_feasible(self, recipe: Recipe) -> bool:
        """Whether a draft is cheap and small enough."""
        return self.limits.allow(recipe, self.prices)

    def ranking(self) -> list[Prediction]:
        """Predictions of complete trials, best first."""
        return ranked(prediction for prediction in self.found.values() if self.is_feasible(prediction.recipe))

    def run(self) -> None:
        """Run trials until there were enough, time is up, or the user interrupts; what was found until then stays."""
        deadline = time.monotonic() + (float("inf") if self.settings.timeout is None else self.settings.timeout)
        try:
            for recipe in self._proposals():
                self._try(recipe)
                self._learn(self.store.news())
                self.on_trial(self.trials, self._best)
                if self.trials >= self.settings.trials or time.monotonic() > deadline:
                    break
        except KeyboardInterrupt:
            self.interrupted = True
            self._learn(self.store.news())  # a trial may have ended and not have been noted

    @property
    def _best(self) -> float | None:
        return max((p.speedup for p in self.found.values() if self.is_feasible(p.recipe)), default=None)

    # --- What to try ---

    def _proposals(self) -> Iterator[Recipe]:
        """Recipes to try next, none that is known or being tried, until no such one is left.

        First the user's own; then those that are known to be good elsewhere.
        """
        if self.trials >= self.settings.trials:
            return
        given = (self.space.nearest(recipe) for recipe in self.settings.start_from)
        known, turn = self._seeds(), 0
        while True:
            recipe = self._new_of(given)
            if recipe is None and self.trials < SEED_SHARE * self.settings.trials:
                recipe = self._new_of(known)
            if recipe is None:
                turn += 1
                recipe = (self._refined() if turn % 2 else None) or self._sampled()
            if recipe is None:
                return
            yield recipe

    def _new_of(self, some: Iterator[Recipe]) -> Recipe | None:
        """The next of them that is neither known nor being tried."""
        taken = self._taken()
        return next((recipe for recipe in some if recipe not in taken), None)

    def _taken(self) -> set[Recipe]:
        return {*self.found, *self.estimated, *self.store.claimed()}

    def _seeds(self) -> Iterator[Recipe]:
        """Those of the space; skip sets that grow by sensitivity, alone and with all else quantised; and at last the
        best skip set that was found, with all else quantised."""
        first, *others = self.space.seeds()
        yield first  # so that even a search without time tries something
        if self.space.skips:
            order = self._by_sensitivity()
            for code in self.space.formats:
                yield from (self.space.quantised(code, skip_set) for skip_set in nested(order, BESIDE_COPIES))
            yield from map(Recipe.of, nested(order))
        yield from others
        for code in self.space.formats if self.space.skips else ():
            if best := next((p for p in self.ranking() if p.recipe.quantised is None), None):
                yield self.space.quantised(code, best.skip_set)

    def _by_sensitivity(self) -> list[Sublayer]:
        """All sub-layers, first those whose absence costs the least agreement for the time it saves."""
        agreement = self.sensitivity()
        return sorted(
            self.space.sublayers(),
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
            for sublayer in self.space.sublayers()
        }
        self.store.publish("sensitivity", json.dumps(agreement).encode())
        return agreement

    def _refined(self) -> Recipe | None:
        """The best recipe with one choice changed, or two: that which promises most of those that were not tried yet.

        What a change did to one of the best recipes it may do to the best one, and two changes what each did.
        """
        taken, parents = self._taken(), [prediction.recipe for prediction in self.ranking()[:PARENTS]]
        if not parents:
            return None
        effects = self._effects(parents)
        known = {change: effects.get(change) for change in self.space.changes(parents[0])}
        ones = [(effect or 1.0 + self._random.uniform(0, 1e-6), (change,)) for change, effect in known.items()]
        seen = [(change, effect) for change, effect in known.items() if effect]
        two = [(a * b, (one, other)) for (one, a), (other, b) in combinations(seen, 2) if one[0] != other[0]]
        for _, changes in sorted([*ones, *two], key=lambda pair: -pair[0]):
            recipe = self.space.changed(parents[0], *changes)
            if recipe not in taken and self.is_feasible(recipe):
                return recipe
        return None

    def _effects(self, parents: Sequence[Recipe]) -> dict[Change, float]:
        """By change: what it did to the estimate, as a factor."""
        factors: dict[Change, list[float]] = {}
        for parent in parents:
            for change in self.space.changes(parent):
                after = self.estimated.get(self.space.changed(parent, change), 0.0)
                if after > 0:
                    factors.setdefault(change, []).append(after / self.estimated[parent])
        return {key: mean(values) for key, values in factors.items()}

    def _sampled(self) -> Recipe | None:
        """The sampler's next idea; any recipe that was not tried, where it has no new one; None where all were."""
        taken = self._taken()
        for _ in range(MOST_REPEATS):
            recipe = self._sampler.propose()
            if recipe not in taken:
                return recipe
            self._sampler.decline(recipe)
        if self.space.size <= FEW:
            left = [recipe for recipe in self.space.every() if recipe not in taken]
            return self._random.choice(left) if left else None
        return next(recipe for recipe in self._drawn() if recipe not in taken)

    def _drawn(self) -> Iterator[Recipe]:
        choices = self.space.choices.items()
        while True:
            yield self.space.from_params({name: self._random.choice(some) for name, some in choices})

    # --- Trying it ---

    def _try(self, recipe: Recipe) -> None:
        worker = f"{socket.gethostname()}:{os.getpid()}"
        record: dict[str, Any] = self.limits.record(recipe, self.prices) | {"worker": worker}
        if (running := self.store.claim(recipe)) is None:
            return  # another worker was first: its result is among the next news
        with running:
            if self.is_feasible(recipe):
                self._replay(recipe, running, record)
            else:
                running.prune(0.0, {**record, "estimate": 0.0}, self.limits.excess(recipe, self.prices))

    def _replay(self, recipe: Recipe, running: Running, record: dict[str, Any]) -> None:
        start, first_depth, estimate = time.monotonic(), None, 0.0

        def how_deep(first: Table) -> int:
            nonlocal first_depth, estimate
            estimates = evaluate(first, self.prices, recipe)
            first_depth, estimate = first, max(way.speedup for way in estimates)
            return 0 if self._is_hopeless(estimate) else depths_worth_replaying(estimates)

        table = self.replay.run(recipe, how_deep)
        assert first_depth is not None
        kept = table or first_depth.shallow(1)
        record |= {
            "estimate": estimate,
            "agreement": first_depth.agreement,
            "seconds": time.monotonic() - start,
            "table": b64encode(kept.to_bytes()).decode(),
        }
        if table is None:
            running.prune(estimate, record, self.limits.excess(recipe, self.prices))
            return
        prediction = best(table, self.prices, recipe)
        record["prediction"] = prediction.to_dict()
        running.finish(prediction.speedup, record, self.limits.excess(recipe, self.prices))

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
            self._note(trial.recipe, prediction_of(trial), trial.record["estimate"])

    def _note(self, recipe: Recipe, prediction: Prediction | None, estimate: float) -> None:
        self.estimated[recipe] = estimate
        if prediction is None:
            self.pruned += 1
        else:
            self.complete += 1
            self.found[recipe] = prediction
            if estimate > 0:
                self.largest_gap = max(self.largest_gap, abs(prediction.speedup / estimate - 1))
        value = None if prediction is None else prediction.speedup
        excess = self.limits.excess(recipe, self.prices)
        self._sampler.tell(recipe, value, estimate=estimate, constraints=excess)


def prediction_of(trial: StoredTrial) -> Prediction | None:
    """What a trial of a study predicted; None if it was pruned."""
    if trial.value is None:
        return None
    return Prediction.from_dict(trial.recipe, trial.record["prediction"])
