"""Opening and retrying: each refusal, lock and lost connection takes one line, and loses nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import optuna
import psycopg
import pytest
import sqlalchemy
from postgres import Server
from selfspec_search.space import seeds
from selfspec_search.storage import database, journal, retrying
from selfspec_search.storage.errors import UnavailableError
from selfspec_search.storage.open import without_password
from selfspec_search.storage.retrying import defer_interrupt
from selfspec_search.storage.study_store import Store, StoredTrial, load_study
from selfspec_search.storage.trial import Heartbeat

from selfspec import InputError
from selfspec.plan.draft_spec import DraftSpec

LAYERS = 3
SETS = [DraftSpec.of(skip_set) for skip_set in seeds(LAYERS)]
DEADLINE = 120.0
"""Seconds: a test gives up after this time."""


def join(
    storage: str | None, name: str | None = "study", lines: list[str] | None = None, heartbeat: Heartbeat | None = None
) -> Store:
    notices = [] if lines is None else lines
    identity = {"model": "tiny"}
    return Store.open(storage, name, identity, num_layers=LAYERS, on_notice=notices.append, heartbeat=heartbeat)


def engine_of(store: Store) -> sqlalchemy.Engine:
    engine = store.ledger.storage.engine
    assert engine is not None
    return engine


def after(pauses: int, action: Callable[[], None]) -> Callable[[float], None]:
    """A replacement for `time.sleep` that calls `action` in pause number `pauses`."""
    sleep, number = time.sleep, count(1)
    return lambda seconds: action() if next(number) == pauses else sleep(seconds)


@contextlib.contextmanager
def locked(path: Path, how: str = "IMMEDIATE") -> Iterator[Callable[[], None]]:
    """An SQLite file that another program holds, until the block ends or the yielded function is called."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute(f"BEGIN {how}")
        yield other.rollback


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
    """The number of Python functions that an action calls; ctrl-C comes with call number `at`.

    Callbacks of weak references do not count: Python discards whatever they raise.
    """
    calls = 0

    def count(frame: FrameType, *_: object) -> None:
        nonlocal calls
        if not frame.f_code.co_filename.endswith(("weakref.py", "_weakrefset.py")):
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
    """Ctrl-C may be raised between any two instructions."""

    @pytest.fixture(autouse=True)
    def _handle_interrupts(self) -> Iterator[None]:
        """Tests that are started in the background ignore ctrl-C."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_at_any_call_nothing_stays_locked_or_half_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(database, "SQLITE_LOCK_SECONDS", 0.1)
        path = tmp_path / "plan.db"
        with join(str(path)) as store:
            store.publish("key", b"before")
            for call in range(1, interrupts(lambda: store.publish("key", b"before")), 11):
                with pytest.raises(KeyboardInterrupt) as held:  # its traceback keeps all frames alive
                    interrupts(lambda: store.publish("key", b"after"), at=call)
                with contextlib.closing(sqlite3.connect(path, timeout=0)) as other:
                    other.execute("BEGIN IMMEDIATE")  # raises where the file is locked
                assert held.value.__traceback__ is not None
                store.publish("key", b"before")
            assert store.get("key") == b"before"

    def test_at_any_call_no_trial_is_reported_as_failed_by_another_worker(self) -> None:
        lines: list[str] = []
        with join(None, lines=lines) as store:

            def finish(at: int | None) -> int:
                with store.begin(SETS[0]) as running:
                    return interrupts(lambda: running.finish(1.5, {}), at)

            for call in range(1, finish(None)):
                with pytest.raises(KeyboardInterrupt):
                    finish(call)
            assert store.claimed() == set()
            assert {trial.value for trial in store.news()} == {1.5}
        assert lines == []

    def test_it_takes_effect_between_two_tries_of_a_locked_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(database, "SQLITE_LOCK_SECONDS", 0.01)
        tries = count(1)

        def interrupt(*_: object) -> None:
            if next(tries) == 2:
                signal.raise_signal(signal.SIGINT)

        path = tmp_path / "x.db"
        with join(str(path)) as store:
            sqlalchemy.event.listen(engine_of(store), "before_cursor_execute", interrupt)
            with locked(path), pytest.raises(KeyboardInterrupt):
                store.begin(SETS[0])
            assert next(tries) == 3  # Optuna would try a new trial five times by itself

    def test_it_takes_effect_at_once_while_a_connection_is_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lose(_: object) -> None:
            raise OSError(errno.EIO, "away")

        monkeypatch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGINT))
        with join(None) as store, pytest.raises(KeyboardInterrupt):
            store.ledger.storage.do(lose)

    def test_a_second_ctrl_c_takes_effect_at_once(self) -> None:
        reached = []

        @defer_interrupt()
        def twice() -> None:
            signal.raise_signal(signal.SIGINT)
            reached.append("the first waits")
            signal.raise_signal(signal.SIGINT)
            reached.append("so does the second")

        with pytest.raises(KeyboardInterrupt):
            twice()
        assert reached == ["the first waits"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    @pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN], ids=["handled", "ignored"])
    def test_a_sigterm_with_a_handler_is_delayed_too(self, ctrl_c: Any) -> None:
        reached = []

        def terminate(number: int, frame: object) -> None:
            reached.append("terminated")

        usual = signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, ctrl_c)
        try:
            with defer_interrupt():
                signal.raise_signal(signal.SIGTERM)
                reached.append("the end of the block")
            assert reached == ["the end of the block", "terminated"]
            assert signal.getsignal(signal.SIGTERM) is terminate
            assert signal.getsignal(signal.SIGINT) is ctrl_c
        finally:
            signal.signal(signal.SIGTERM, usual)


class TestRefusals:
    @pytest.mark.parametrize(
        ("storage", "line"),
        [
            ("{}/nowhere/x.db", "there is no directory"),
            ("{}/nowhere/x.journal", "there is no directory"),
            ("{}/protected/x.db", "may not be written"),
            ("{}/protected/x.journal", "may not be written"),
            ("{}", "is a directory, a device or a pipe"),
            ("{}/null", "is a directory, a device or a pipe"),
            ("{}/null.journal", "is a directory, a device or a pipe"),
            ("~no_such_user/x.db", "there is no directory"),
            ("sqlite://", "names no file"),
            ("sqlite:///:memory:", "names no file"),
            ("journal://", "names no file"),
            ("", "names no file"),
            ("redis://localhost", "is not a database"),
            ("mysql://localhost/db", "is not a database"),
            ("postgresql://me:hush@127.0.0.1:1/db", "refused"),
            ("postgresql://me:hush@127.0.0.1:port/db", "cannot be read"),
        ],
    )
    @pytest.mark.usefixtures("protected")
    def test_a_storage_that_cannot_be_used_is_refused_without_its_password(
        self, tmp_path: Path, storage: str, line: str
    ) -> None:
        for name in ("null", "null.journal"):
            (tmp_path / name).symlink_to("/dev/null")
        refused = refusal(storage.format(tmp_path))
        assert line in refused
        assert "hush" not in refused

    @pytest.mark.parametrize(
        ("name", "text", "line"),
        [
            ("prompts.txt", "Once upon a time there was a file", "file is not a database"),
            *(
                ("x.journal", text, "is not a journal of Optuna")
                for text in ("not JSON\n", "[1, 2]\n", '{"prompt": "hello"}\n', "7\n", "no line end")
            ),
            *(
                ("x.journal", text, "is damaged")
                for text in ('{"op_code":99}\n', '{"op_code":0}\n', '{"op_code":0,"study_name":1,"directions":2}\n')
            ),
        ],
    )
    def test_another_file_is_refused_and_stays_as_it_is(self, tmp_path: Path, name: str, text: str, line: str) -> None:
        file = tmp_path / name
        file.write_text(text)
        assert line in refusal(str(file))
        assert file.read_text() == text

    def test_another_program_s_database_stays_as_it_is(self, tmp_path: Path) -> None:
        file = tmp_path / "places.db"
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute("CREATE TABLE bookmarks (id INTEGER)")
        before = file.read_bytes()
        assert "another program's database (it has a table 'bookmarks')" in refusal(str(file))
        assert file.read_bytes() == before

    def test_a_study_that_another_tool_made(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path / 'x.db'}"
        study = optuna.create_study(storage=url, study_name="study")
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
        assert "was not made by this search; choose another --study" in refusal(url)

    def test_a_missing_driver_is_named_with_what_installs_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "psycopg", None)
        assert "pip install 'selfspec[postgresql]'" in refusal("postgresql://me@localhost/db")

    def test_a_database_that_is_not_there_or_has_no_tables(self, postgres: Server) -> None:
        assert "does not exist" in refusal(postgres.url + "_nowhere")
        with pytest.raises(InputError, match="holds no study of any kind"):
            load_study(postgres.new_database())


def test_a_file_without_a_study_of_ours_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    optuna.create_study(storage=f"sqlite:///{tmp_path / 'theirs.db'}", study_name="theirs")
    files = set(tmp_path.iterdir())
    for name, line in {
        "x.db": "does not exist",
        "x.journal": "does not exist",
        "empty.db": "holds no study of any kind",
        "theirs.db": "holds no study of a search",
    }.items():
        with pytest.raises(InputError, match=line):
            load_study(str(tmp_path / name))
    assert set(tmp_path.iterdir()) == files


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


class TestLocks:
    @pytest.fixture(autouse=True)
    def _tries_are_short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(database, "SQLITE_LOCK_SECONDS", 0.05)

    def test_a_file_that_stays_locked_ends_a_trial_and_refuses_another_worker_in_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "x.db"
        monkeypatch.setattr(retrying, "RETRY_SECONDS", 0.2)
        with (
            pytest.raises(InputError, match=r"is locked by another program: .*give the same command again") as error,
            join(str(path)) as store,
            store.begin(SETS[0]) as running,
            locked(path, "EXCLUSIVE"),
        ):
            running.finish(1.5, {})
        assert "\n" not in str(error.value)
        with locked(path, "EXCLUSIVE"):
            assert "is locked by another program: database is locked" in refusal(str(path))

    @pytest.mark.parametrize("use", [join, lambda path, lines: load_study(path)], ids=["join", "read"])
    def test_a_file_is_opened_when_the_other_program_lets_go(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[..., Any]
    ) -> None:
        path = tmp_path / "x.db"
        join(str(path)).close()
        with locked(path, "EXCLUSIVE") as let_go:
            monkeypatch.setattr(time, "sleep", after(3, let_go))
            opened = use(str(path), lines=[])
        assert opened.name == "study"
        if isinstance(opened, Store):
            opened.close()

    def test_only_a_long_wait_is_reported_and_only_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "x.db"
        lines: list[str] = []
        with join(str(path), lines=lines) as store:
            for notice_after in (DEADLINE, 0.0):
                monkeypatch.setattr(retrying, "LOCK_NOTICE_SECONDS", notice_after)
                with monkeypatch.context() as patch, locked(path) as let_go:
                    patch.setattr(time, "sleep", after(4, let_go))
                    store.publish("key", b"data")
        (line,) = lines
        assert "is locked by another program: database is locked; trying again for 90 s" in line

    def test_a_row_that_a_stopped_worker_locked_is_waited_for(
        self, postgres: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(database.POSTGRES_SESSION, "lock_timeout", 50)
        monkeypatch.setattr(retrying, "LOCK_NOTICE_SECONDS", 0.0)
        lines: list[str] = []
        with join(postgres.url, "row", lines) as store, psycopg.connect(postgres.url) as other:
            other.execute("SELECT * FROM studies FOR UPDATE")
            monkeypatch.setattr(store.ledger.storage, "on_notice", lambda line: (lines.append(line), other.rollback()))
            late = threading.Timer(DEADLINE, other.rollback)
            late.start()
            with store.begin(SETS[0]) as running:
                running.finish(1.5, {})
            late.cancel()
            assert [trial.value for trial in store.news()] == [1.5]
        (line,) = lines
        assert "is locked by another program: canceling statement due to lock timeout" in line

    def test_the_server_ends_the_transaction_of_a_worker_that_stopped_in_it(
        self, postgres: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setitem(database.POSTGRES_SESSION, "idle_in_transaction_session_timeout", 1_000)
            stopped = join(postgres.url, "stopped")
        monkeypatch.setitem(database.POSTGRES_SESSION, "lock_timeout", 50)
        with stopped, join(postgres.url, "stopped") as store:
            connection = engine_of(stopped).connect()
            connection.exec_driver_sql("SELECT * FROM studies FOR UPDATE")
            with store.begin(SETS[0]) as running:
                running.finish(1.5, {})
            with contextlib.suppress(UnavailableError):
                connection.close()
            assert [trial.value for trial in stopped.news()] == [1.5]  # it goes on with another connection

    @pytest.mark.parametrize("given", ["", "?options=-c%20statement_timeout%3D54321"])
    def test_settings_of_a_session_that_the_user_gives_hold(
        self, postgres: Server, monkeypatch: pytest.MonkeyPatch, given: str
    ) -> None:
        if not given:
            monkeypatch.setenv("PGOPTIONS", "-c statement_timeout=54321")
        with join(postgres.url + given, "settings") as store, engine_of(store).connect() as connection:
            held = dict(connection.exec_driver_sql("SELECT name, setting FROM pg_settings").all())  # type: ignore[arg-type]
        for name, value in (database.POSTGRES_SESSION | {"statement_timeout": 54321}).items():
            assert held[name] == str(value)

    def test_a_killed_worker_s_lock_on_a_journal_is_removed_before_living_workers_look_dead(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, passed = tmp_path / "x.journal", 0.0

        def sleep(seconds: float) -> None:
            nonlocal passed
            passed += seconds

        clock = SimpleNamespace(monotonic=lambda: passed, sleep=sleep)
        with join(str(path)) as store:
            Path(f"{path}.lock").touch()
            monkeypatch.setattr(optuna.storages.journal._file, "time", clock)
            store.publish("key", b"data")
        assert journal.JOURNAL_LOCK_SECONDS < passed < Heartbeat().grace - Heartbeat().interval


@pytest.mark.slow
class TestLostConnections:
    def test_a_trial_goes_on_when_the_server_comes_back(
        self, postgres: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retrying, "PAUSES_SECONDS", (0.2,))
        lines: list[str] = []
        with join(postgres.url, "comes back", lines) as store:
            with store.begin(SETS[0]) as running:
                postgres.stop()
                back = threading.Timer(0.5, postgres.start)
                back.start()
                running.finish(1.25, {"a": 1})
            back.join()
            assert store.news() == [StoredTrial(number=running.number, draft_spec=SETS[0], value=1.25, record={"a": 1})]
        (line,) = lines
        assert line.endswith("; trying again for 90 s")
        assert "secret" not in line
        assert "\n" not in line

    def test_a_server_that_stays_away_ends_the_search_in_one_line(
        self, postgres: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retrying, "PAUSES_SECONDS", (0.1,))
        monkeypatch.setattr(retrying, "RETRY_SECONDS", 0.5)
        lines: list[str] = []
        store = join(postgres.url, "away", lines)
        running = store.begin(SETS[0])
        postgres.stop()
        try:
            with pytest.raises(InputError, match="give the same command again") as error, store, running:
                running.finish(1.25, {})
        finally:
            postgres.start()
        assert "\n" not in str(error.value)
        assert len(lines) <= 1


@pytest.mark.parametrize(
    ("storage", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se cret@ho:st/db", "postgresql://…"),
        ("/a/plan.db", "/a/plan.db"),
        ("journal:///shared/x.journal", "journal:///shared/x.journal"),
    ],
)
def test_a_password_is_never_shown(storage: str, shown: str) -> None:
    assert without_password(storage) == shown
