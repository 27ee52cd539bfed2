"""The study store, on every kind of storage."""

from __future__ import annotations

import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from optuna.trial import TrialState
from postgres import Server
from selfspec_search.space import seeds
from selfspec_search.storage import shared_data
from selfspec_search.storage.study_store import Store, StoredTrial, load_study
from selfspec_search.storage.trial import OWNER, Heartbeat

from selfspec import InputError
from selfspec.plan.draft_spec import DraftSpec

T = TypeVar("T")
LAYERS = 5
SETS = [DraftSpec.of(skip_set) for skip_set in seeds(LAYERS)]
IDENTITY = {"model": "tiny llama", "gamma_max": 7, "new_tokens": 31}
SILENT = Heartbeat(interval=3600.0, grace=0.0)
"""A trial is stale soon after its beginning."""


def join(storage: str | None, name: str | None, **options: Any) -> Store:
    return Store.open(storage, name, IDENTITY, num_layers=LAYERS, **options)


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of calls that start together, each in its own thread."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


def becomes_stale(store: Store) -> bool:
    """Whether the store has failed the only running trial."""
    assert store.news() == []
    return store.claimed() == set()


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storages")


def at(kind: str, directory: Path, request: pytest.FixtureRequest) -> str | None:
    """A storage of this kind, the same for all tests: creating tables takes a while."""
    if kind == "postgresql":
        server: Server = request.getfixturevalue("postgres")
        return server.url
    return {"memory": None, "sqlite": str(directory / "plan.db"), "journal": str(directory / "plan.journal")}[kind]


@pytest.fixture(params=["memory", "sqlite", "journal", "postgresql"])
def storage(request: pytest.FixtureRequest, directory: Path) -> str | None:
    return at(request.param, directory, request)


@pytest.fixture(params=["sqlite", "journal", pytest.param("postgresql", marks=pytest.mark.slow)])
def shared(request: pytest.FixtureRequest, directory: Path) -> str:
    """A storage that several workers can open."""
    storage = at(request.param, directory, request)
    assert storage is not None
    return storage


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """The name of a study that no other test uses."""
    return request.node.name


@pytest.fixture
def store(storage: str | None, name: str) -> Iterator[Store]:
    with join(storage, name) as store:
        yield store


class TestEveryStorage:
    def test_a_trial_comes_back_as_it_was_written_and_a_pruned_one_without_a_value(self, store: Store) -> None:
        record = {"estimate": 1.25, "prediction": {"gamma": 3, "lookup": None}, "table": "x" * 50_000}
        with store.begin(SETS[0]) as running:
            running.finish(1.37, record, {"draft_cost": -0.2})
        with store.begin(SETS[1]) as running:
            running.prune(0.9, {"estimate": 0.9})
        assert store.news() == [
            StoredTrial(number=1, draft_spec=SETS[0], value=1.37, record=record),
            StoredTrial(number=2, draft_spec=SETS[1], value=None, record={"estimate": 0.9}),
        ]

    def test_a_finished_trial_is_news_once(self, store: Store) -> None:
        for draft_spec in SETS[:3]:
            with store.begin(draft_spec) as running:
                running.finish(1.0, {})
        assert [trial.draft_spec for trial in store.news()] == SETS[:3]
        assert store.news() == []
        with store.begin(SETS[3]) as running:
            running.finish(1.0, {})
            assert [trial.draft_spec for trial in store.news()] == [SETS[3]]

    def test_a_draft_spec_is_claimed_while_it_is_tried(self, store: Store) -> None:
        assert store.claimed() == set()
        with suppress(ZeroDivisionError), store.begin(SETS[2]):
            assert store.claimed() == {SETS[2]}
            raise ZeroDivisionError
        assert store.claimed() == set()
        assert store.news() == []

    @pytest.mark.parametrize("size", [0, 100_003, 3_000_017])
    def test_a_blob_comes_back_whole(self, store: Store, size: int) -> None:
        assert store.get("texts") is None
        data = random.Random(0).randbytes(size)
        store.publish("texts", data)
        assert store.get("texts") == data

    def test_the_first_worker_makes_the_shared_data(self, store: Store) -> None:
        assert store.created
        assert store.share(lambda: {"profile": b"mine", "texts": b""}) == {"profile": b"mine", "texts": b""}
        assert store.share(lambda: {"profile": b"again"}) == {"profile": b"mine", "texts": b""}
        assert store.news() == []
        assert store.claimed() == set()


class TestStaleTrials:
    def test_the_trial_of_a_silent_worker_is_failed_and_its_draft_spec_is_free_again(
        self, shared: str, name: str
    ) -> None:
        with join(shared, name) as first, join(shared, name, heartbeat=SILENT) as second:
            first.share(dict)
            second.begin(SETS[2])
            assert second.claim(SETS[2]) is None
            until(lambda: becomes_stale(second))
            again = first.claim(SETS[2])
            assert again is not None
            again.finish(1.5, {})
            assert [trial.draft_spec for trial in second.news()] == [SETS[2]]

    def test_the_trial_of_a_process_that_ended_on_this_machine_is_failed_at_once(
        self, shared: str, name: str, ended_process: int
    ) -> None:
        with join(shared, name) as store:
            store.begin(SETS[2])
            trial = store.ledger.trials()[-1]
            owner = {**trial.system_attrs[OWNER], "pid": ended_process}
            store.ledger.storage.do(lambda raw: raw.set_trial_system_attr(trial._trial_id, OWNER, owner))
            assert becomes_stale(store)

    def test_a_result_that_comes_after_the_trial_was_failed_is_dropped_with_a_notice(
        self, shared: str, name: str
    ) -> None:
        lines: list[str] = []
        with join(shared, name, on_notice=lines.append, heartbeat=SILENT) as store:
            late = store.begin(SETS[2])
            until(lambda: becomes_stale(store))
            late.finish(9.0, {})
            assert store.news() == []
        (line,) = lines
        assert line.startswith(f"trial {late.number} was failed by another worker")

    @pytest.mark.slow
    def test_the_trial_of_a_living_worker_is_never_failed(self, shared: str, name: str) -> None:
        with join(shared, name, heartbeat=Heartbeat(interval=0.2, grace=2.5)) as store, store.begin(SETS[2]) as running:
            end = time.monotonic() + 3.6
            while time.monotonic() < end:
                assert store.news() == []
                assert store.claimed() == {SETS[2]}
                time.sleep(0.1)
            running.finish(1.0, {})
            assert len(store.news()) == 1

    @pytest.fixture
    def ended_process(self) -> int:
        with subprocess.Popen(["true"]) as process:
            process.wait()
        return process.pid


class TestSharedStorages:
    def test_a_worker_that_joins_learns_the_finished_trials_and_does_not_make_the_shared_data(
        self, shared: str, name: str
    ) -> None:
        with join(shared, name) as first, join(shared, name) as second:
            assert (first.created, second.created) == (True, False)
            first.share(lambda: {"profile": b"first"})
            first.begin(SETS[0]).finish(1.25, {"a": [1]})
            assert second.share(lambda: {"profile": b"second"}) == {"profile": b"first"}
            assert second.news() == [StoredTrial(number=1, draft_spec=SETS[0], value=1.25, record={"a": [1]})]

    def test_waiting_for_a_living_creator_is_reported_once_and_has_no_limit(
        self, shared: str, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pauses, lines = count(1), list[str]()
        pause = SimpleNamespace(sleep=lambda _: next(pauses) == 5 and made())
        monkeypatch.setattr(shared_data, "time", pause)
        with join(shared, name) as first, join(shared, name, on_notice=lines.append) as second:

            def made() -> None:
                first.share(lambda: {"profile": b"first"})

            assert second.share(lambda: {"profile": b"second"}) == {"profile": b"first"}
        assert lines == ["waiting for the worker that writes texts and measures the profile"]

    def test_a_waiting_worker_replaces_a_creator_that_leaves(self, shared: str, name: str) -> None:
        first = join(shared, name)
        with join(shared, name) as second:
            threading.Timer(0.3, first.close).start()
            assert second.share(lambda: {"profile": b"second"}) == {"profile": b"second"}
            assert second.created

    def test_a_creator_that_was_failed_by_mistake_takes_what_its_successor_published(
        self, shared: str, name: str
    ) -> None:
        def make() -> dict[str, bytes]:
            setup = store.ledger.trials()[0]._trial_id
            store.ledger.storage.do(lambda raw: raw.set_trial_state_values(setup, TrialState.FAIL))
            with join(shared, name) as successor:
                assert successor.created
                successor.share(lambda: {"profile": b"successor"})
            return {"profile": b"creator"}

        with join(shared, name) as store:
            assert store.share(make) == {"profile": b"successor"}

    @pytest.mark.parametrize(
        ("changed", "layers", "line"),
        [
            ({"gamma_max": 4, "sampling": "greedy"}, LAYERS, "gamma_max 7 (here 4), sampling unset (here greedy)"),
            ({}, 6, "layers 5 (here 6)"),
        ],
    )
    def test_a_worker_that_does_not_agree_is_refused_by_the_parts_that_differ(
        self, shared: str, name: str, changed: dict[str, Any], layers: int, line: str
    ) -> None:
        join(shared, name).close()
        with pytest.raises(InputError, match=re.escape(f"was made with {line}; choose another --study")):
            Store.open(shared, name, IDENTITY | changed, num_layers=layers)

    def test_without_a_name_a_study_is_found_by_its_identity(self, shared: str) -> None:
        with join(shared, None) as first, join(shared, None) as second:
            assert first.name == second.name
        with Store.open(shared, None, {**IDENTITY, "gamma_max": 3}, num_layers=LAYERS) as third:
            assert third.name != first.name

    def test_of_many_workers_that_join_at_once_one_is_the_creator_and_all_share(self, shared: str, name: str) -> None:
        stores, made = at_once([lambda: join(shared, name)] * 4), count(1)
        assert sorted(store.created for store in stores) == [False, False, False, True]
        data = at_once([lambda store=store: store.share(lambda: {"profile": b"%d" % next(made)}) for store in stores])
        assert data == [{"profile": b"1"}] * 4
        for store in stores:
            store.close()

    def test_of_workers_that_claim_a_draft_spec_at_once_the_first_has_it(self, shared: str, name: str) -> None:
        stores = [join(shared, name) for _ in range(4)]
        got = at_once([lambda store=store: store.claim(SETS[3]) for store in stores])
        (running,) = [each for each in got if each is not None]
        assert stores[0].claimed() == {SETS[3]}
        running.finish(1.0, {})
        assert stores[1].claim(SETS[3]) is None  # this worker did not know the result
        assert [trial.draft_spec for trial in stores[1].news()] == [SETS[3]]
        again = stores[1].claim(SETS[3])
        assert again is not None  # a worker that knows the result may want another one
        again.fail()
        for store in stores:
            store.close()

    def test_a_study_is_read_without_writing(self, shared: str, name: str) -> None:
        with join(shared, name) as store:
            store.share(lambda: {"profile": b"p"})
            with store.begin(SETS[0]) as running:
                running.finish(1.25, {"a": 1})
            with store.begin(SETS[1]) as running:
                running.prune(0.5, {})
            with store.begin(SETS[2]):
                study = load_study(shared, name)
        assert study.identity == IDENTITY
        assert study.space.num_layers == LAYERS
        assert study.blobs == {"profile": b"p"}
        assert [(trial.draft_spec, trial.value) for trial in study.trials] == [(SETS[0], 1.25), (SETS[1], None)]
        with pytest.raises(InputError, match=re.escape(f"'{name}'")):
            load_study(shared, "nothing")
