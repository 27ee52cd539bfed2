"""Study: Optuna over what becomes of sub-layers, each trial a replay, ended after one depth where it looks hopeless."""

from __future__ import annotations

import os
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Iterable
from typing import Any

from selfspec.plan.draft_spec import DraftSpec
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.table import Table
from selfspec_search.settings import SearchSettings
from selfspec_search.storage.study_store import Running, Store, StoredTrial
from selfspec_search.study.constraints import LimitCheck, Limits
from selfspec_search.study.objective import Prediction, Prices, best, depths_worth_replaying, evaluate
from selfspec_search.study.proposals import Findings, Proposals
from selfspec_search.study.sampler import Sampler


class Study:
    """A worker's trials in one search; `findings` are those of all its workers."""

    def __init__(
        self,
        replay: Replay,
        prices: Prices,
        settings: SearchSettings,
        store: Store,
        limits: Limits,
        on_trial: Callable[[int, float | None], None] = lambda done, best: None,
    ) -> None:
        self.replay, self.prices, self.settings, self.store = replay, prices, settings, store
        self.on_trial, self.interrupted = on_trial, False
        self.findings = Findings(prices=prices, limits=limits)
        news = store.news()
        # Workers that join, perhaps all at once, go their own ways.
        seed = settings.seed + (0 if store.created else len(news) + os.getpid())
        self._sampler = Sampler(settings.sampler, seed, store.space)
        self._proposals = Proposals(replay, self.findings, settings, store, self._sampler, seed)
        self._learn(news)

    def run(self) -> None:
        """Run trials until there were enough, time is up, or the user interrupts; what was found until then stays."""
        deadline = time.monotonic() + (float("inf") if self.settings.timeout is None else self.settings.timeout)
        try:
            for draft_spec in self._proposals.draft_specs():
                self._try(draft_spec)
                self._learn(self.store.news())
                self.on_trial(self.findings.trials, self.findings.best)
                if self.findings.trials >= self.settings.trials or time.monotonic() > deadline:
                    break
        except KeyboardInterrupt:
            self.interrupted = True
            self._learn(self.store.news())  # a trial may have ended and not have been noted

    def _try(self, draft_spec: DraftSpec) -> None:
        if (running := self.store.claim(draft_spec)) is None:
            return  # another worker was first: its result is among the next news
        check = self.findings.check(draft_spec)
        record = _record(check)
        with running:
            if check.is_feasible:
                self._replay(draft_spec, running, record)
            else:
                running.prune(0.0, {**record, "estimate": 0.0}, check.excess)

    def _replay(self, draft_spec: DraftSpec, running: Running, record: dict[str, Any]) -> None:
        start, first_depth, estimate = time.monotonic(), None, 0.0
        excess = self.findings.check(draft_spec).excess

        def how_deep(first: Table) -> int:
            nonlocal first_depth, estimate
            estimates = evaluate(first, self.prices, draft_spec)
            first_depth, estimate = first, max(way.speedup for way in estimates)
            return 0 if self.findings.is_hopeless(estimate) else depths_worth_replaying(estimates)

        table = self.replay.run(draft_spec, how_deep)
        assert first_depth is not None
        kept = table or first_depth.shallow(1)
        record |= {
            "estimate": estimate,
            "agreement": first_depth.agreement,
            "seconds": time.monotonic() - start,
            "table": b64encode(kept.to_bytes()).decode(),
        }
        if table is None:
            running.prune(estimate, record, excess)
            return
        prediction = best(table, self.prices, draft_spec)
        record["prediction"] = prediction.to_dict()
        running.finish(prediction.speedup, record, excess)

    def _learn(self, news: Iterable[StoredTrial]) -> None:
        """Take in what this worker, others and earlier runs found."""
        for trial in news:
            prediction, estimate = prediction_of(trial), trial.record["estimate"]
            self.findings.note(trial.draft_spec, prediction, estimate)
            value, excess = (
                None if prediction is None else prediction.speedup,
                self.findings.check(trial.draft_spec).excess,
            )
            self._sampler.tell(trial.draft_spec, value, estimate=estimate, constraints=excess)


def _record(check: LimitCheck) -> dict[str, Any]:
    """What a trial keeps of its draft, and who tries it."""
    worker = f"{socket.gethostname()}:{os.getpid()}"
    return {"draft_cost": check.draft_cost, "draft_bytes": check.draft_bytes, "worker": worker}


def prediction_of(trial: StoredTrial) -> Prediction | None:
    """What a trial of a study predicted; None if it was pruned."""
    if trial.value is None:
        return None
    return Prediction.from_dict(trial.draft_spec, trial.record["prediction"])
