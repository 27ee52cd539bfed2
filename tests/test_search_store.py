"""The store, on every kind of storage."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from selfspec_search import ledger as ledger_module
from selfspec_search import sharing as sharing_module
from selfspec_search.running import BEAT
from selfspec_search.space import seeds
from selfspec_search.store import Store, StoredTrial, load_study, study_names

from selfspec import InputError, SkipSet
from selfspec.plan.draft_spec import Recipe

if TYPE_CHECKING:
    from postgres import Server

pytest_plugins = ["postgres"]

T = TypeVar("T")
LAYERS = 5
SETS = [Recipe.of(skip_set) for skip_set in seeds(LAYERS)]
IDENTITY = {"model": "tiny llama", "gamma_max": 7, "new_tokens": 31}
AT_ONCE = {"heartbeat": 3600.0, "grace": 0.0}
"""Whoever has been seen without a heartbeat in between is taken for dead at the next look."""


def join(storage: str | None, name: str | None, **options: Any) -> Store:
    return Store.open(storage, name, IDENTITY, num_layers=LAYERS, **options)


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What the calls return, each made by a thread of its own at the same moment."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def beat_of(store: Store) -> int:
    """The last heartbeat of the last trial."""
    return int(store._ledger.trials()[-1].system_attrs.get(BEAT, 0))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it never came to this"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storages")


def at(kind: str, directory: Path, request: pytest.FixtureRequest) -> str | None:
    """A storage of this kind, the same one for all tests: making tables takes a while."""
    if kind == "postgresql":
        server: Server = request.getfixturevalue("postgres")
        return server.url
    return {"memory": None, "sqlite": str(directory / "plan.db"), "journal": str(directory / "plan.journal")}[kind]


@pytest.fixture(params=["memory", "sqlite", "journal", "postgresql"])
def storage(request: pytest.FixtureRequest, directory: Path) -> str | None:
    return at(request.param, directory, request)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Of a study that no other test has."""
    return request.node.name


@pytest.fixture
def store(storage: str | None, name: str) -> Iterator[Store]:
    with join(storage, name) as store:
        yield store


class TestEveryStorage:
    def test_a_complete_trial_comes_back_as_it_was_told(self, store: Store) -> None:
        record = {"estimate": 1.25, "prediction": {"gamma": 3, "lookup": None}, "table": "x" * 50_000}
        with store.begin(SETS[0]) as running:
            running.finish(1.37, record, {"draft_cost": -0.2})
        assert store.news() == [StoredTrial(number=1, recipe=SETS[0], value=1.37, record=record)]

    def test_a_pruned_trial_comes_back_without_a_value(self, store: Store) -> None:
        with store.begin(SETS[1]) as running:
            running.prune(0.9, {"estimate": 0.9})
        assert store.news() == [StoredTrial(number=1, recipe=SETS[1], value=None, record={"estimate": 0.9})]

    def test_news_are_told_once(self, store: Store) -> None:
        for skip_set in SETS[:3]:
            with store.begin(skip_set) as running:
                running.finish(1.0, {})
        assert [trial.recipe for trial in store.news()] == SETS[:3]
        assert store.news() == []
        with store.begin(SETS[3]) as running:
            running.finish(1.0, {})
            assert [trial.recipe for trial in store.news()] == [SETS[3]]

    def test_a_set_is_claimed_while_it_is_tried(self, store: Store) -> None:
        assert store.claimed() == set()
        with store.begin(SETS[2]) as running:
            assert store.claimed() == {SETS[2]}
            running.finish(1.0, {})
        assert store.claimed() == set()

    def test_a_trial_left_without_a_result_is_no_news_and_claims_nothing(self, store: Store) -> None:
        def breaks() -> None:
            with store.begin(SETS[2]):
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            breaks()
        assert store.news() == []
        assert store.claimed() == set()
        assert store.waiting() is None

    def test_the_trial_of_a_living_worker_is_never_handed_out(
        self, storage: str | None, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        minutes = SimpleNamespace(monotonic=count(0, 60).__next__)  # grace is over at the next look without a heartbeat
        monkeypatch.setattr(ledger_module, "time", minutes)
        with join(storage, name, heartbeat=0.02) as store, store.begin(SETS[2]):
            for _ in range(4):
                assert store.waiting() is None
                seen = beat_of(store)
                until(lambda seen=seen: beat_of(store) > seen)

    def test_the_trial_of_a_silent_worker_is_handed_out_once(self, storage: str | None, name: str) -> None:
        with join(storage, name, **AT_ONCE) as store:
            store.begin(SETS[2])  # and never entered, so that no heartbeat comes
            assert [store.waiting() for _ in range(4)] == [None, SETS[2], None, None]
            with store.begin(SETS[2]) as running:
                running.finish(1.5, {})
            assert [trial.recipe for trial in store.news()] == [SETS[2]]

    def test_what_a_worker_given_up_finishes_is_dropped_and_told(self, storage: str | None, name: str) -> None:
        lines: list[str] = []
        with join(storage, name, on_notice=lines.append, **AT_ONCE) as store:
            late = store.begin(SETS[2])
            assert [store.waiting() for _ in range(2)] == [None, SETS[2]]
            late.finish(9.0, {})
            assert store.news() == []
        (line,) = lines
        assert line.startswith(f"trial {late.number} was taken over by another worker")

    def test_a_set_that_kills_its_workers_is_given_up(self, storage: str | None, name: str) -> None:
        handed_out = []
        with join(storage, name, **AT_ONCE) as store:
            skip_set: SkipSet | None = SETS[4]
            while skip_set is not None:
                store.begin(skip_set)
                assert store.waiting() is None
                skip_set = store.waiting()
                handed_out.append(skip_set)
        assert handed_out == [SETS[4]] * 3 + [None]

    @pytest.mark.parametrize("size", [0, 100_003])
    def test_a_blob_comes_back_whole(self, store: Store, size: int) -> None:
        assert store.get("texts") is None
        data = random.Random(0).randbytes(size)
        store.publish("texts", data)
        assert store.get("texts") == data

    def test_the_first_worker_makes_what_is_shared(self, store: Store) -> None:
        assert store.created
        assert store.share(lambda: {"profile": b"mine", "texts": b""}) == {"profile": b"mine", "texts": b""}
        assert store.share(lambda: {"profile": b"again"}) == {"profile": b"mine", "texts": b""}
        assert store.news() == []
        assert store.claimed() == set()


@pytest.fixture(params=["sqlite", "journal", pytest.param("postgresql", marks=pytest.mark.slow)])
def shared(request: pytest.FixtureRequest, directory: Path) -> str:
    """A storage that several workers can open."""
    storage = at(request.param, directory, request)
    assert storage is not None
    return storage


class TestSharedStorages:
    def test_who_joins_learns_what_was_found(self, shared: str, name: str) -> None:
        with join(shared, name) as first, first.begin(SETS[0]) as running:
            running.finish(1.25, {"a": [1]})
        with join(shared, name) as second:
            assert second.news() == [StoredTrial(number=1, recipe=SETS[0], value=1.25, record={"a": [1]})]

    def test_who_joins_does_not_make_what_is_shared(self, shared: str, name: str) -> None:
        with join(shared, name) as first, join(shared, name) as second:
            assert (first.created, second.created) == (True, False)
            first.share(lambda: {"profile": b"first"})
            assert second.share(lambda: {"profile": b"second"}) == {"profile": b"first"}

    def test_waiting_for_a_maker_ends_in_one_line(self, shared: str, name: str) -> None:
        with (
            join(shared, name),
            join(shared, name) as second,
            pytest.raises(InputError, match="has not published") as e,
        ):
            second.share(lambda: {}, seconds=0.1)
        assert "\n" not in str(e.value)

    def test_who_waits_for_a_maker_that_lives_says_so_once_and_waits_for_as_long_as_it_takes(
        self, shared: str, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pauses, lines = count(1), list[str]()
        hours = SimpleNamespace(monotonic=count(0, 3600).__next__, sleep=lambda _: next(pauses) == 5 and made())
        monkeypatch.setattr(sharing_module, "time", hours)
        with join(shared, name) as first, join(shared, name, on_notice=lines.append) as second:

            def made() -> None:
                first.share(lambda: {"profile": b"first"})

            assert second.share(lambda: {"profile": b"second"}) == {"profile": b"first"}
        assert lines == ["waiting for the worker that writes texts and measures the profile"]

    def test_what_a_maker_did_not_get_done_another_makes(self, shared: str, name: str) -> None:
        with join(shared, name) as first:
            assert first.created
        with join(shared, name) as second:
            assert second.created
            assert second.share(lambda: {"profile": b"second"}) == {"profile": b"second"}

    def test_a_worker_that_waits_takes_over_from_a_maker_that_stops(self, shared: str, name: str) -> None:
        first = join(shared, name)
        with join(shared, name) as second:
            threading.Timer(0.3, first.close).start()
            assert second.share(lambda: {"profile": b"second"}, seconds=30) == {"profile": b"second"}
            assert second.created

    def test_another_identity_is_refused_by_the_parts_that_differ(self, shared: str, name: str) -> None:
        join(shared, name).close()
        other = {**IDENTITY, "gamma_max": 4, "sampling": "greedy"}
        with pytest.raises(InputError) as e:
            Store.open(shared, name, other, num_layers=LAYERS)
        assert "was made with gamma_max 7 (here 4), sampling unset (here greedy); choose another --study" in str(
            e.value
        )
        assert "secret" not in str(e.value)

    def test_another_number_of_layers_is_refused(self, shared: str, name: str) -> None:
        join(shared, name).close()
        with pytest.raises(InputError, match=r"made with layers 5 \(here 6\)"):
            Store.open(shared, name, IDENTITY, num_layers=6)

    def test_without_a_name_studies_are_told_apart_by_what_they_are_about(self, shared: str) -> None:
        with join(shared, None) as first, join(shared, None) as second:
            assert first.name == second.name
        with Store.open(shared, None, {**IDENTITY, "gamma_max": 3}, num_layers=LAYERS) as third:
            assert third.name != first.name

    def test_of_many_workers_at_once_one_is_the_maker(self, shared: str, name: str) -> None:
        stores = at_once([lambda: join(shared, name)] * 4)
        assert sorted(store.created for store in stores) == [False, False, False, True]
        for store in stores:
            store.close()

    def test_a_dead_worker_s_trial_goes_to_one_of_those_who_ask_at_once(self, shared: str, name: str) -> None:
        stores = [join(shared, name, **AT_ONCE) for _ in range(4)]
        stores[0].begin(SETS[3])
        assert [store.waiting() for store in stores] == [None] * 4
        got = at_once([store.waiting for store in stores])
        assert sorted(got, key=str) == sorted([SETS[3], None, None, None], key=str)
        for store in stores:
            store.close()

    def test_of_workers_that_claim_a_set_at_once_the_first_has_it(self, shared: str, name: str) -> None:
        stores = [join(shared, name) for _ in range(4)]
        got = at_once([lambda store=store: store.claim(SETS[3]) for store in stores])
        (running,) = [each for each in got if each is not None]
        assert stores[0].claimed() == {SETS[3]}
        running.finish(1.0, {})
        assert stores[1].claim(SETS[3]) is None  # it had not heard of the result
        assert [trial.recipe for trial in stores[1].news()] == [SETS[3]]
        again = stores[1].claim(SETS[3])
        assert again is not None  # who knows the result may still want another
        again.fail()
        for store in stores:
            store.close()

    def test_a_dead_worker_s_trial_of_a_set_that_another_has_is_not_handed_out(self, shared: str, name: str) -> None:
        with join(shared, name, **AT_ONCE) as store:
            with store.begin(SETS[3]) as running:
                running.finish(1.0, {})
            store.begin(SETS[3])  # and never entered, so that no heartbeat comes
            store.begin(SETS[4])
            assert [store.waiting() for _ in range(3)] == [None, SETS[4], None]
            assert store.claimed() == set()

    def test_the_set_of_a_trial_that_failed_can_be_claimed(self, shared: str, name: str) -> None:
        with join(shared, name) as first, join(shared, name) as second:
            first.begin(SETS[3]).fail()
            running = second.claim(SETS[3])
            assert running is not None
            running.finish(1.0, {})

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
        assert study.num_layers == LAYERS
        assert study.blobs == {"profile": b"p"}
        assert [(trial.recipe, trial.value) for trial in study.trials] == [(SETS[0], 1.25), (SETS[1], None)]
        assert name in study_names(shared)

    def test_a_study_that_is_not_there_is_refused_with_those_that_are(self, shared: str, name: str) -> None:
        join(shared, name).close()
        with pytest.raises(InputError, match=re.escape(f"'{name}'")):
            load_study(shared, "nothing")
