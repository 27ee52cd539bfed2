"""Study: a worker's trials.

A trial replays a draft spec on few texts, then one depth of all texts, then all depths. It ends as soon as the draft
cannot be the best.
"""

from __future__ import annotations

import os
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Iterable
from typing import Any

from selfspec.plan.draft_spec import DraftSpec
from selfspec_search.budget import Budget
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.table import Table
from selfspec_search.settings import SearchSettings
from selfspec_search.storage.study_store import Running, Store, StoredTrial
from selfspec_search.study.constraints import Limits
from selfspec_search.study.objective import Prediction, Prices, best, depths_worth_replaying, evaluate
from selfspec_search.study.proposals import Findings, Proposals
from selfspec_search.study.race import Race
from selfspec_search.study.sampler import Sampler


class Study:
    """A worker's trials in a search. `findings` holds the findings of all workers of the study."""

    def __init__(
        self,
        replay: Replay,
        prices: Prices,
        settings: SearchSettings,
        store: Store,
        limits: Limits,
        on_trial: Callable[[int, float | None], None] = lambda done, best: None,
        on_sensitivity: Callable[[int, int], None] = lambda done, total: None,
        budget: Budget | None = None,
    ) -> None:
        self.replay, self.prices, self.settings, self.store = replay, prices, settings, store
        self.budget, self._race = budget or Budget(), Race(replay, prices)
        self.on_trial, self.interrupted = on_trial, False
        self.findings = Findings(prices=prices, limits=limits)
        news = store.news()
        # Workers that join at the same time need different seeds, or they would propose the same drafts.
        seed = settings.seed + (0 if store.created else len(news) + os.getpid())
        self._sampler = Sampler(settings.sampler, seed, store.space)
        self._proposals = Proposals(
            replay, self.findings, settings, store, self._sampler, seed, self.budget, on_sensitivity
        )
        self._learn(news)

    def run(self) -> None:
        """Run trials until the study has enough, time is up, or the user interrupts. Earlier findings remain."""
        timeout = float("inf") if self.settings.timeout is None else self.settings.timeout
        deadline = time.monotonic() + min(timeout, self.budget.until("confirm"))
        try:
            for draft_spec in self._proposals.draft_specs():
                self._try(draft_spec)
                self._learn(self.store.news())
                self.on_trial(self.findings.trials, self.findings.best)
                if self.findings.trials >= self.settings.trials:
                    break
                if time.monotonic() > deadline:
                    self.budget.cut(f"{self.findings.trials} of {self.settings.trials} drafts were tried")
                    break
        except KeyboardInterrupt:
            self.interrupted = True
            self._learn(self.store.news())  # a trial may have ended before the interrupt

    def _try(self, draft_spec: DraftSpec) -> None:
        if (running := self.store.claim(draft_spec)) is None:
            return  # another worker runs this trial; `store.news` will return its result
        check = self.findings.check(draft_spec)
        record: dict[str, Any] = {
            "draft_cost": check.draft_cost,
            "draft_bytes": check.draft_bytes,
            "worker": f"{socket.gethostname()}:{os.getpid()}",
        }
        with running:
            if check.is_feasible:
                self._replay(draft_spec, running, record, check.excess)
            else:
                running.prune(0.0, {**record, "estimate": 0.0}, check.excess)

    def _replay(
        self, draft_spec: DraftSpec, running: Running, record: dict[str, Any], excess: dict[str, float]
    ) -> None:
        start, first_depth, estimate, few = time.monotonic(), None, 0.0, 0.0
        if self._race.pays:
            few, agreement = self._race.run(draft_spec)
            if self._race.is_lost(few, self.findings.best or 0.0):
                expected, seconds = self._race.expected(few), time.monotonic() - start
                running.prune(
                    expected, {**record, "estimate": expected, "agreement": agreement, "seconds": seconds}, excess
                )
                return

        def how_deep(first: Table) -> int:
            nonlocal first_depth, estimate
            estimates = evaluate(first, self.prices, draft_spec)
            first_depth, estimate = first, max(way.speedup for way in estimates)
            return 0 if self.findings.is_hopeless(estimate) else depths_worth_replaying(estimates)

        table = self.replay.run(draft_spec, how_deep)
        assert first_depth is not None
        if few:
            self._race.learn(few, estimate)
        kept = table if table.depths else first_depth.shallow(1)
        record |= {
            "estimate": estimate,
            "agreement": first_depth.agreement,
            "seconds": time.monotonic() - start,
            "table": b64encode(kept.to_bytes()).decode(),
        }
        if not table.depths:
            running.prune(estimate, record, excess)
            return
        prediction = best(table, self.prices, draft_spec)
        running.finish(prediction.speedup, {**record, "prediction": prediction.to_dict()}, excess)

    def _learn(self, news: Iterable[StoredTrial]) -> None:
        """Add finished trials of this worker, other workers and earlier runs to the findings and the sampler."""
        for trial in news:
            draft_spec, prediction, estimate = trial.draft_spec, prediction_of(trial), trial.record["estimate"]
            self.findings.add(draft_spec, prediction, estimate)
            excess = self.findings.check(draft_spec).excess
            value = None if prediction is None else prediction.speedup
            self._sampler.learn(draft_spec, value, estimate=estimate, constraints=excess)


def prediction_of(trial: StoredTrial) -> Prediction | None:
    """The prediction of a stored trial; None if the trial was pruned."""
    return None if trial.value is None else Prediction.from_dict(trial.draft_spec, trial.record["prediction"])
