"""Workers in separate processes, some of them killed: each loses at most its running trial."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from postgres import Server
from selfspec_search.space import skip_set_of, sublayers
from selfspec_search.storage import journal
from selfspec_search.storage import trial as trial_module
from selfspec_search.storage.study_store import Store, load_study
from selfspec_search.storage.trial import Heartbeat

from selfspec.plan.draft_spec import DraftSpec

pytestmark = pytest.mark.slow

JOURNAL_LOCK_SECONDS = 3
"""Seconds: a worker may be killed while it holds the lock, and tests wait less for the lock than users."""
LAYERS = 4
SETS = [DraftSpec.of(skip_set_of([sublayer])) for sublayer in sublayers(LAYERS)]
DEADLINE = 240.0


def join(storage: str, **options: Any) -> Store:
    return Store.open(storage, "study", {"model": "tiny"}, num_layers=LAYERS, **options)


@pytest.fixture(autouse=True)
def _short_journal_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "JOURNAL_LOCK_SECONDS", JOURNAL_LOCK_SECONDS)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Workers are forked from a process that has imported everything, so they start quickly."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["selfspec_search.storage.study_store", "test_storage_workers"])
    return context


@pytest.fixture(params=["sqlite", "journal", "postgresql"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty storage, without tables."""
    if request.param == "postgresql":
        server: Server = request.getfixturevalue("postgres")
        return server.new_database()
    return str(tmp_path / {"sqlite": "plan.db", "journal": "plan.journal"}[request.param])


class Workers:
    """Worker processes, which are killed when the test ends."""

    def __init__(self, context: ForkServerContext) -> None:
        self._context = context
        self.started: list[ForkServerProcess] = []

    def start(self, target: Any, *arguments: Any) -> ForkServerProcess:
        process = self._context.Process(target=as_worker, args=(target, *arguments))
        process.start()
        self.started.append(process)
        return process

    def wait(self) -> None:
        for process in self.started:
            process.join(DEADLINE)
            assert process.exitcode == 0


@pytest.fixture
def workers(processes: ForkServerContext) -> Iterator[Workers]:
    workers = Workers(processes)
    yield workers
    for process in workers.started:
        process.kill()
        process.join()


def as_worker(target: Any, *arguments: Any) -> None:
    """The main function of a worker's process."""
    journal.JOURNAL_LOCK_SECONDS = JOURNAL_LOCK_SECONDS
    target(*arguments)


def dies_in_a_trial(storage: str, at_it: Any) -> None:
    with join(storage) as store:
        store.share(dict)
        for skip_set in SETS[:2]:
            with store.begin(skip_set) as running:
                running.finish(1.0, {"table": "x" * 1000})
        with store.begin(SETS[2]):
            at_it.set()
            time.sleep(DEADLINE)


def dies_in_making(storage: str, at_it: Any) -> None:
    def make() -> dict[str, bytes]:
        at_it.set()
        time.sleep(DEADLINE)
        return {}

    with join(storage) as store:
        store.share(make)


def works(storage: str, machine: str, dies_on: DraftSpec | None, dying: Any) -> None:
    """Try draft specs that nobody tries until all are finished; die in the trial of `dies_on`, before others begin."""
    trial_module.machine = lambda: machine
    finished = set[DraftSpec]()
    with join(storage, heartbeat=Heartbeat(interval=0.1, grace=5.0)) as store:
        store.share(dict)
        assert dies_on or dying.wait(DEADLINE)
        while finished != set(SETS):
            free = [draft_spec for draft_spec in SETS if draft_spec not in finished | store.claimed()]
            if free and (running := store.claim(dies_on or free[0])) is not None:
                with running:
                    if dies_on:
                        dying.set()
                        time.sleep(DEADLINE)
                    running.finish(1.0, {"by": machine})
            time.sleep(0.02)
            finished.update(trial.draft_spec for trial in store.news())


def works_until_killed(storage: str, seed: int, at_it: Any) -> None:
    sets = random.Random(seed)
    with join(storage, heartbeat=Heartbeat(interval=0.05, grace=5.0)) as store:
        store.share(dict)
        while True:
            with store.begin(sets.choice(SETS)) as running:
                running.finish(1.0, {"table": "x" * 20_000})
            at_it.set()


def kill_at(event: Any, process: ForkServerProcess) -> None:
    assert event.wait(DEADLINE)
    process.kill()
    process.join()


def test_a_search_resumed_after_a_kill_has_all_finished_trials_and_fails_the_lost_one_at_once(
    workers: Workers, shared: str, processes: ForkServerContext
) -> None:
    at_it = processes.Event()
    kill_at(at_it, workers.start(dies_in_a_trial, shared, at_it))
    with join(shared) as store:
        assert [trial.draft_spec for trial in store.news()] == SETS[:2]
        assert store.claimed() == set()
        running = store.claim(SETS[2])
        assert running is not None
        running.finish(1.0, {})
        states = [trial.state for trial in store.ledger.trials()][1:]
    assert states == [TrialState.COMPLETE] * 2 + [TrialState.FAIL, TrialState.COMPLETE]


def test_a_creator_that_is_killed_is_replaced_at_once(
    workers: Workers, shared: str, processes: ForkServerContext
) -> None:
    at_it = processes.Event()
    kill_at(at_it, workers.start(dies_in_making, shared, at_it))
    with join(shared) as store:
        assert store.created
        assert store.share(lambda: {"profile": b"new"}) == {"profile": b"new"}


def test_of_three_workers_one_is_killed_and_the_others_finish_all_draft_specs_once(
    workers: Workers, shared: str, processes: ForkServerContext
) -> None:
    dying = processes.Event()
    for number in range(3):  # different machine names, so that only missing heartbeats show the death
        workers.start(works, shared, f"machine {number}", SETS[0] if number == 2 else None, dying)
    kill_at(dying, workers.started.pop())
    workers.wait()
    trials = load_study(shared).trials
    assert Counter(trial.draft_spec for trial in trials) == Counter(SETS)
    assert {trial.record["by"] for trial in trials} <= {"machine 0", "machine 1"}


def test_workers_killed_at_any_moment_leave_nothing_half_done(
    workers: Workers, shared: str, processes: ForkServerContext
) -> None:
    moments = random.Random(0)
    finished = 0
    for seed in range(8):
        at_it = processes.Event()
        process = workers.start(works_until_killed, shared, seed, at_it)
        if seed % 2 == 0:  # the others may be killed before they have joined the study
            assert at_it.wait(DEADLINE)
        time.sleep(moments.uniform(0, 0.7))
        process.kill()
        process.join()
        trials = load_study(shared).trials
        assert len(trials) >= finished
        finished = len(trials)
    with join(shared) as store:
        trials = store.news()
        assert store.claimed() == set()
        lost = [trial for trial in store.ledger.trials() if trial.params and trial.state == TrialState.FAIL]
    assert len(lost) <= 8
    assert trials
    assert all(trial.record == {"table": "x" * 20_000} for trial in trials)
