"""Storages that cannot be used, and connections that are lost: one line each, and nothing lost."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import psycopg
import pytest
from selfspec_search import storage as storage_module
from selfspec_search import storage_file, storage_url
from selfspec_search.interrupts import hold_back
from selfspec_search.space import seeds
from selfspec_search.store import Store, StoredTrial, load_study, study_names

from selfspec import InputError

if TYPE_CHECKING:
    from postgres import Server

pytest_plugins = ["postgres"]

LAYERS = 3
SETS = list(seeds(LAYERS))


def join(storage: str | None, name: str | None = "study", lines: list[str] | None = None) -> Store:
    notices = [] if lines is None else lines
    return Store.open(storage, name, {"model": "tiny"}, num_layers=LAYERS, on_notice=notices.append)


def refusal(storage: str, name: str | None = "study") -> str:
    with pytest.raises(InputError) as error:
        join(storage, name)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def protected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory where nothing may be written, even where tests run as root."""
    place = tmp_path / "protected"
    place.mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != place and allowed(path, mode))
    return place


def interrupts(action: Callable[[], object], at: int | None = None) -> int:
    """How many Python functions an action calls; ctrl-C comes with the one whose number is given."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            signal.raise_signal(signal.SIGINT)

    before = sys.gettrace()
    sys.settrace(count)
    try:
        action()
    finally:
        sys.settrace(before)
    return calls


class TestCtrlC:
    """It may come between any two instructions."""

    def test_at_whatever_call_it_strikes_nothing_stays_locked_or_half_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage_file, "LOCK_SECONDS", 0.1)
        path = tmp_path / "plan.db"
        with join(str(path)) as store:
            store.publish("key", b"before")
            for call in range(1, interrupts(lambda: store.publish("key", b"before")), 11):
                with pytest.raises(KeyboardInterrupt) as held:  # its traceback keeps all that it came through
                    interrupts(lambda: store.publish("key", b"after"), at=call)
                with contextlib.closing(sqlite3.connect(path, timeout=0)) as other:
                    other.execute("BEGIN IMMEDIATE")  # raises where the file is locked
                assert held.value.__traceback__ is not None
                store.publish("key", b"before")
            assert store.get("key") == b"before"

    def test_while_a_connection_is_waited_for_it_strikes_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lose(_: object) -> None:
            raise OSError(errno.EIO, "away")

        monkeypatch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGINT))
        with join(None) as store, pytest.raises(KeyboardInterrupt):
            store._ledger.storage.do(lose)

    def test_a_second_one_strikes_at_once(self) -> None:
        reached = []

        @hold_back()
        def twice() -> None:
            signal.raise_signal(signal.SIGINT)
            reached.append("the first waits")
            signal.raise_signal(signal.SIGINT)
            reached.append("so does the second")

        with pytest.raises(KeyboardInterrupt):
            twice()
        assert reached == ["the first waits"]

    def test_afterwards_it_is_what_it_was(self) -> None:
        usual = signal.getsignal(signal.SIGINT)
        with hold_back(), hold_back():
            assert signal.getsignal(signal.SIGINT) is not usual
        assert signal.getsignal(signal.SIGINT) is usual
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with hold_back():
                signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, usual)

    def test_threads_go_on_unhindered(self) -> None:
        with ThreadPoolExecutor(1) as pool, hold_back():

            def hold() -> bool:
                with hold_back():
                    return True

            assert pool.submit(hold).result()


class TestRefusals:
    @pytest.mark.parametrize("name", ["x.db", "x.journal"])
    def test_a_directory_that_is_not_there(self, tmp_path: Path, name: str) -> None:
        assert "there is no directory" in refusal(str(tmp_path / "nowhere" / name))

    @pytest.mark.parametrize("name", ["x.db", "x.journal"])
    def test_a_directory_that_is_protected(self, protected: Path, name: str) -> None:
        assert "may not be written" in refusal(str(protected / name))

    def test_a_directory_in_place_of_a_file(self, tmp_path: Path) -> None:
        assert "is a directory" in refusal(str(tmp_path))

    def test_a_text_file_is_no_database_and_stays_as_it_is(self, tmp_path: Path) -> None:
        file = tmp_path / "prompts.txt"
        file.write_text("Once upon a time there was a file")
        assert "is no SQLite database" in refusal(str(file))
        assert file.read_text() == "Once upon a time there was a file"

    @pytest.mark.parametrize("text", ["not JSON\n", "[1, 2]\n", '{"prompt": "hello"}\n', "7\n", "no line end"])
    def test_another_file_is_no_journal_and_stays_as_it_is(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "x.journal"
        file.write_text(text)
        assert "is no journal of Optuna's" in refusal(str(file))
        assert file.read_text() == text

    def test_another_program_s_database_stays_as_it_is(self, tmp_path: Path) -> None:
        file = tmp_path / "places.db"
        with sqlite3.connect(file) as connection:
            connection.execute("CREATE TABLE bookmarks (id INTEGER)")
        connection.close()
        before = file.read_bytes()
        assert "another program's database (it has a table 'bookmarks')" in refusal(str(file))
        assert file.read_bytes() == before

    def test_a_study_that_another_tool_made(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path / 'x.db'}"
        study = optuna.create_study(storage=url, study_name="study")
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
        assert "was not made by this search; choose another --study" in refusal(url)

    def test_a_file_that_another_program_keeps_locked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "x.db"
        optuna.create_study(storage=f"sqlite:///{path}")
        monkeypatch.setattr(storage_file, "LOCK_SECONDS", 0.1)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            assert "database is locked; mend that" in refusal(str(path))

    def test_a_host_that_refuses(self) -> None:
        line = refusal("postgresql://me:hush@127.0.0.1:1/db")
        assert "hush" not in line
        assert "refused" in line

    def test_a_password_that_cannot_be_read_is_not_shown(self) -> None:
        assert "hush" not in refusal("postgresql://me:hush@127.0.0.1:port/db")

    @pytest.mark.parametrize("url", ["redis://localhost", "pigeon://coop"])
    def test_a_kind_of_database_that_nobody_knows(self, url: str) -> None:
        assert "is no kind of database" in refusal(url)

    def test_a_missing_driver_is_named_with_what_installs_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage_url, "find_spec", lambda name: None)
        assert "pip install 'selfspec[postgresql]'" in refusal("postgresql://me@localhost/db")

    @pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "journal://", ""])
    def test_a_storage_without_a_file(self, url: str) -> None:
        assert "names no file" in refusal(url)

    def test_a_database_that_is_not_there(self, postgres: Server) -> None:
        assert "does not exist" in refusal(postgres.url + "_nowhere")

    def test_a_database_without_tables_is_read_without_a_connection_left_open(self, postgres: Server) -> None:
        url = postgres.new_database()
        with pytest.raises(InputError, match="holds no study of any kind") as refused:
            load_study(url)
        with psycopg.connect(postgres.url, autocommit=True) as connection:
            connected = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
            deadline = time.monotonic() + 10  # the server takes a moment to see that a client has gone
            while connection.execute(connected, [url.rpartition("/")[2]]).fetchone() != (0,):
                assert time.monotonic() < deadline, f"still connected after: {refused.value}"
                time.sleep(0.02)


class TestReading:
    def test_a_file_that_is_not_there_is_not_made(self, tmp_path: Path) -> None:
        for name in ("x.db", "x.journal"):
            with pytest.raises(InputError, match="does not exist"):
                load_study(str(tmp_path / name))
        assert list(tmp_path.iterdir()) == []

    def test_a_storage_without_studies_of_ours(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path / 'x.db'}"
        optuna.create_study(storage=url, study_name="theirs")
        assert study_names(url) == []
        with pytest.raises(InputError, match="holds no study of selfspec"):
            load_study(url)

    def test_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.db").touch()
        with pytest.raises(InputError, match="holds no stud"):
            load_study(str(tmp_path / "x.db"))

    def test_the_only_study_needs_no_name_and_of_several_all_are_named(self, tmp_path: Path) -> None:
        path = str(tmp_path / "x.db")
        join(path, "one").close()
        assert load_study(path).name == "one"
        join(path, "two").close()
        with pytest.raises(InputError, match="'one', 'two'; choose one with --study"):
            load_study(path)


@pytest.mark.parametrize("path", ["a b.db", "100%.db", "{x}.db", "é.journal", "what?.journal", "{SCHEMA_VERSION}.db"])
def test_files_may_have_any_name(tmp_path: Path, path: str) -> None:
    with join(str(tmp_path / path)) as store:
        assert store.created
    assert (tmp_path / path).exists()
    assert load_study(str(tmp_path / path)).name == "study"


def test_a_half_line_that_a_killed_worker_left_in_a_journal_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    join(str(path)).close()
    with path.open("ab") as file:
        file.write(b'{"op_code": 8, "text": "' + b"x" * 200_001)
    with join(str(path)) as store, store.begin(SETS[0]) as running:
        running.finish(1.5, {})
    assert [trial.value for trial in load_study(str(path)).trials] == [1.5]


@pytest.mark.slow
class TestLostConnections:
    def test_a_trial_goes_on_when_the_server_comes_back(
        self,
        postgres: Server,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(storage_module, "PAUSES", (0.2,) * 100)
        lines: list[str] = []
        with join(postgres.url, "comes back", lines) as store:
            with store.begin(SETS[0]) as running:
                postgres.stop()
                back = threading.Timer(0.5, postgres.start)
                back.start()
                running.finish(1.25, {"a": 1})
            back.join()
            assert store.news() == [StoredTrial(number=running.number, skip_set=SETS[0], value=1.25, record={"a": 1})]
        assert lines
        assert all("the connection to storage" in line and "trying again in 0.2 s" in line for line in lines)
        assert not any("secret" in line or "\n" in line for line in lines)

    def test_a_restart_between_two_calls_is_not_even_noticed(self, postgres: Server) -> None:
        lines: list[str] = []
        with join(postgres.url, "restart", lines) as store:
            postgres.stop()
            postgres.start()
            with store.begin(SETS[0]) as running:
                running.finish(1.25, {})
            assert [trial.value for trial in store.news()] == [1.25]
        assert lines == []

    def test_a_server_that_stays_away_ends_the_search_in_one_line(
        self,
        postgres: Server,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(storage_module, "PAUSES", (0.1, 0.1))
        lines: list[str] = []

        def loses_its_server() -> None:
            with join(postgres.url, "away", lines) as store, store.begin(SETS[0]) as running:
                postgres.stop()
                running.finish(1.25, {})

        try:
            with pytest.raises(InputError, match="give the same command again") as error:
                loses_its_server()
        finally:
            postgres.start()
        assert "\n" not in str(error.value)
        assert len(lines) == 2

    def test_heartbeats_go_on_after_an_outage_and_complain_once(self, postgres: Server) -> None:
        lines: list[str] = []
        with Store.open(
            postgres.url, "beats", {}, num_layers=LAYERS, on_notice=lines.append, heartbeat=0.1, grace=60
        ) as store:
            store.share(dict)
            with store.begin(SETS[0]) as running:
                postgres.stop()
                threading.Event().wait(0.6)
                postgres.start()
                threading.Event().wait(0.6)
                beats = [store._ledger.trials()[-1].system_attrs.get("selfspec:beat")]
                threading.Event().wait(0.6)
                beats.append(store._ledger.trials()[-1].system_attrs["selfspec:beat"])
                running.finish(1.0, {})
        assert beats[0] != beats[1]
        assert len([line for line in lines if "no heartbeat" in line]) == 1
