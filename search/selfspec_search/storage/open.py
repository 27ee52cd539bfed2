"""Open: from a path or URL to an open storage, and one clear line where that fails.

Each shared storage has Optuna's heartbeat: `record_heartbeat`, and trials that are stale once heartbeats stop.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL, ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.orm import Session

from selfspec.errors import InputError
from selfspec_search.storage.errors import STORAGE_ERRORS, UnavailableError, describe, is_locked, reason_of
from selfspec_search.storage.retrying import RetryingStorage, retry

JOURNAL_SCHEME, JOURNAL_SUFFIX = "journal://", ".journal"
SQLITE_MAGIC, JOURNAL_MAGIC = b"SQLite format 3\x00", b'{"op_code":'
HEARTBEAT = "selfspec:beat"
"""The attribute of a trial in a journal that changes with each heartbeat."""
SQLITE_LOCK_SECONDS = 1.0
"""Seconds that one try waits for a lock, during which ctrl-C has no effect. Workers hold the file for milliseconds."""
JOURNAL_LOCK_SECONDS = 8
"""Seconds after which a journal's lock is taken from its holder, which was killed. Nobody can write a heartbeat until
then, so that it must be well below `GRACE_SECONDS`."""
TABLE_TRIES = 10
"""Workers that start together may create the same tables: all but one fail, and find the tables on a later try."""
POSTGRES_DRIVERS = ("psycopg", "psycopg2")
POSTGRES_CONNECT = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
"""A silent host is given up after seconds, not after the minutes or hours of the system's defaults."""
POSTGRES_SESSION = {"lock_timeout": 5_000, "idle_in_transaction_session_timeout": 60_000, "TimeZone": "UTC"}
"""Times in milliseconds. The server ends the transaction of a worker that was stopped or cut off, and its locks; ctrl-C
has no effect while one try waits for a lock. Optuna's heartbeats need one time zone for all workers."""
PARAM_COLUMNS = ("trial_id", "param_name", "param_value", "distribution_json")
PARAMS = sqlalchemy.table("trial_params", *map(sqlalchemy.column, PARAM_COLUMNS))
HEARTBEATS = sqlalchemy.table("trial_heartbeats", *map(sqlalchemy.column, ("trial_id", "heartbeat")))
JOURNAL_DAMAGE = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""What Optuna raises for lines of a journal that Optuna did not write."""


class Heartbeat(NamedTuple):
    """How a running trial shows that its worker is alive."""

    interval: float = 10.0
    """Seconds between two heartbeats of a trial."""
    grace: float = 30.0
    """Seconds without a heartbeat after which a trial is stale: longer than one lost connection."""


def open_storage(
    storage: str | None,
    *,
    on_notice: Callable[[str], None],
    create: bool = True,
    heartbeat: Heartbeat | None = None,
) -> RetryingStorage:
    """Open a storage.

    Args:
        storage: None for memory; a path ending in '.journal', or 'journal://PATH', for a journal file; any other path
            for an SQLite file; else a URL for SQLAlchemy. 'postgresql://' uses psycopg.
        on_notice: receives lines about locks and lost connections.
        create: whether to create what does not exist yet. If not, nothing is written.
        heartbeat: of running trials.

    Raises:
        InputError: the storage cannot be used; the message says why and what to do.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # notices say the same in one line
    if storage is None:
        return RetryingStorage(InMemoryStorage(), "memory", on_notice)
    label, opener = _opener(storage, create, heartbeat or Heartbeat())
    try:
        return RetryingStorage(retry(opener, is_locked, label, on_notice), label, on_notice)
    except ImportError as error:
        scheme = storage.partition("://")[0]
        what = "pip install 'selfspec[postgresql]'" if scheme.startswith("postgres") else "install it with pip"
        raise InputError(f"storage: the Python driver for {scheme} is not installed; {what}") from error
    except (RuntimeError, *STORAGE_ERRORS) as error:  # Optuna's RuntimeError names the command that upgrades old tables
        if not create and "version_info" in reason_of(error):  # the table that Optuna reads first
            raise InputError(f"storage '{label}' holds no study of any kind; give the storage of a search") from error
        raise InputError(f"{describe(label, error)}; mend that, or give another storage") from error


def without_password(storage: str) -> str:
    """The path or URL as it may be shown."""
    if "://" not in storage:
        return storage
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return storage.partition("://")[0] + "://…"


def _opener(storage: str, create: bool, heartbeat: Heartbeat) -> tuple[str, Callable[[], BaseStorage]]:
    """The storage's name in messages, and the function that opens it."""
    if storage.startswith(JOURNAL_SCHEME) or ("://" not in storage and storage.endswith(JOURNAL_SUFFIX)):
        journal = _path(storage.removeprefix(JOURNAL_SCHEME), storage)
        return storage, lambda: _open_journal(journal, storage, create, heartbeat)
    url = _parsed(storage) if "://" in storage else URL.create("sqlite", database=storage)
    if url.get_backend_name() == "sqlite":
        file = _path(url.database or "", storage)
        return storage, lambda: _open_sqlite(file, storage, create, heartbeat)
    label = url.render_as_string(hide_password=True)
    return label, lambda: _open_database(url, create, _engine_options(url), heartbeat)


# --- URLs ---


def _path(path: str, storage: str) -> Path:
    if path in ("", ":memory:"):
        raise InputError(f"storage '{storage}' names no file; give a path, or no storage to keep trials in memory")
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:  # there is no such user
        raise InputError(f"storage '{storage}' cannot be found: {error}; give the whole path") from error


def _parsed(storage: str) -> URL:
    scheme = storage.partition("://")[0]
    try:
        url = make_url(storage)
        if url.drivername in ("postgresql", "postgres"):
            url = url.set(drivername="postgresql+psycopg")
        url.get_dialect()
    except NoSuchModuleError as error:
        raise InputError(
            f"storage: '{scheme}' is no kind of database; give a file, journal://PATH, or a URL such as "
            "postgresql://USER:PASSWORD@HOST/DATABASE"
        ) from error
    except (ArgumentError, ValueError) as error:
        raise InputError(
            f"storage: the URL after '{scheme}://' cannot be read; write {scheme}://USER:PASSWORD@HOST:PORT/DATABASE, "
            "with special characters in the password as %XX"
        ) from error
    return url


def _engine_options(url: URL) -> dict[str, Any]:
    """Arguments of the engine; its pool replaces connections that a restarted server closed."""
    if url.get_driver_name() not in POSTGRES_DRIVERS:
        return {"pool_pre_ping": True}
    connect = {name: value for name, value in POSTGRES_CONNECT.items() if name not in url.query}
    given = url.query.get("options", os.environ.get("PGOPTIONS", ""))
    ours = [f"-c {name}={value}" for name, value in POSTGRES_SESSION.items()]
    options = " ".join([*ours, *([given] if isinstance(given, str) else given)])  # the last value of a name holds
    return {"pool_pre_ping": True, "connect_args": connect | {"options": options}}


# --- Databases ---


def _open_database(url: URL, create: bool, options: dict[str, Any], heartbeat: Heartbeat) -> BaseStorage:
    """Optuna's storage at `url`, with a cache of finished trials in front."""
    # Optuna formats the URL as a template, in which the user's own braces are doubled.
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    for attempt in range(TABLE_TRIES):
        try:
            return get_storage(_Database(text, heartbeat, engine_kwargs=options, skip_table_creation=not create))
        except DBAPIError as error:
            raced = isinstance(error, IntegrityError) or "already exists" in str(error.orig)
            if attempt == TABLE_TRIES - 1 or not raced:
                raise
            time.sleep(0.05 * (attempt + 1))
    raise AssertionError("the last try returns or raises")


class _Database(RDBStorage):
    """Optuna's storage, which writes a new trial faster, and its first heartbeat in the same transaction.

    Optuna reads twice per parameter to check that all trials have the same choices, as ours do. With a parameter per
    sub-layer, reading takes most of a trial's time here. If a release of Optuna renames a method, Optuna's own runs.
    """

    def __init__(self, url: str, heartbeat: Heartbeat, **options: Any) -> None:
        try:
            super().__init__(url, **options)
        except BaseException:
            if hasattr(self, "engine"):  # nothing else can close its connections
                self.scoped_session.remove()
                self.engine.dispose()
            raise
        # As arguments, they would make Optuna warn of an experimental feature.
        self.heartbeat_interval, self.grace_period = heartbeat  # type: ignore[assignment]
        sqlalchemy.event.listen(self.engine, "handle_error", _raise_unavailable)

    def _get_prepared_new_trial(self, study_id: int, template: FrozenTrial | None, session: Session) -> Any:
        """A trial without any heartbeat never gets stale, even if its worker was killed a moment later."""
        trial = super()._get_prepared_new_trial(study_id, template, session)
        now = sqlalchemy.func.current_timestamp()
        session.execute(HEARTBEATS.insert().values(trial_id=trial.trial_id, heartbeat=now))
        return trial

    def _set_trial_param_without_commit(
        self,
        session: Session,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        *_: object,
        **__: object,
    ) -> None:
        row = (trial_id, param_name, param_value_internal, distribution_to_json(distribution))
        session.execute(PARAMS.insert().values(dict(zip(PARAM_COLUMNS, row, strict=True))))


def _raise_unavailable(context: ExceptionContext) -> None:
    """Replace temporary errors of SQLAlchemy; Optuna handles the others."""
    if context.is_pre_ping or context.sqlalchemy_exception is None:  # None: ctrl-C
        return
    if context.is_disconnect or context.connection is None or is_locked(context.original_exception):
        raise UnavailableError(str(context.original_exception))  # SQLAlchemy sets the cause


# --- Files ---


def _open_sqlite(path: Path, label: str, create: bool, heartbeat: Heartbeat) -> BaseStorage:
    if _is_written(path, label, create):
        _check_sqlite(path, label)
    url = URL.create("sqlite", database=str(path))
    storage = _open_database(url, create, {"connect_args": {"timeout": SQLITE_LOCK_SECONDS}}, heartbeat)
    if create:
        _lock_before_reading(storage._backend.engine)  # type: ignore[attr-defined]
    return storage


def _open_journal(path: Path, label: str, create: bool, heartbeat: Heartbeat) -> BaseStorage:
    if _is_written(path, label, create):
        with path.open("rb") as file:
            head = file.read(len(JOURNAL_MAGIC))
        if not JOURNAL_MAGIC.startswith(head):
            raise InputError(f"storage '{label}' is no journal of Optuna's; give another file")
    try:
        return _Journal(path, heartbeat)
    except JOURNAL_DAMAGE as error:
        raise InputError(f"storage '{label}' is damaged: a line of it cannot be read; give another file") from error


def _is_written(path: Path, label: str, create: bool) -> bool:
    """Whether the file exists and is not empty; `InputError` if it can be neither used nor created."""
    if path.is_dir():
        raise InputError(f"storage '{label}' is a directory; give a file in it")
    if path.exists() and not path.is_file():
        raise InputError(f"storage '{label}' is a device or a pipe; give an ordinary file")
    if not path.parent.is_dir():
        raise InputError(f"storage '{label}': there is no directory {path.parent}; make it, or give another file")
    if not path.exists() and not create:
        raise InputError(f"storage '{label}' does not exist; give the file that a search wrote")
    # Both kinds of file create a second file next to it while they write.
    needed = [path.parent, *([path] if path.exists() else [])] if create else []
    if not all(os.access(place, os.W_OK) for place in needed) or (path.exists() and not os.access(path, os.R_OK)):
        raise InputError(
            f"storage '{label}' may not be {'written' if create else 'read'}: the file or its directory is protected; "
            "give a file elsewhere, or change its permissions"
        )
    return path.exists() and path.stat().st_size > 0


def _check_sqlite(path: Path, label: str) -> None:
    with path.open("rb") as file:
        if file.read(len(SQLITE_MAGIC)) != SQLITE_MAGIC:
            raise InputError(f"storage '{label}' is no SQLite database; give another file")
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=SQLITE_LOCK_SECONDS)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error as error:
        if is_locked(error):
            raise UnavailableError(str(error)) from error
        raise InputError(f"{describe(label, error)}; mend that, or give another storage") from error
    if tables and not tables & {"studies", "trials", "version_info"}:
        raise InputError(
            f"storage '{label}' is another program's database (it has a table '{min(tables)}'); give another"
        )


def _lock_before_reading(engine: sqlalchemy.Engine) -> None:
    """Begin each transaction as a writer, so that what it has read still holds when it writes.

    Otherwise SQLite lets two workers read the same state of a trial, and both change it.
    """

    def begin_by_hand(connection: Any, _: object) -> None:
        connection.isolation_level = None

    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # of connections that were opened before
    sqlalchemy.event.listen(engine, "connect", begin_by_hand)
    sqlalchemy.event.listen(engine, "begin", begin)


class _Journal(JournalStorage, BaseHeartbeat):
    """Optuna's journal with the heartbeat that Optuna has for databases only.

    Clocks of two machines are not compared: a trial is stale if this process saw no new heartbeat for the grace period.
    """

    def __init__(self, path: Path, heartbeat: Heartbeat) -> None:
        super().__init__(JournalFileBackend(str(path), lock_obj=_JournalLock(path)))
        self._heartbeat = heartbeat
        self._seen: dict[int, tuple[float | None, float]] = {}

    def record_heartbeat(self, trial_id: int) -> None:
        self.set_trial_system_attr(trial_id, HEARTBEAT, time.time())

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        now, before = time.monotonic(), self._seen
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        last = {trial._trial_id: trial.system_attrs.get(HEARTBEAT) for trial in running}
        self._seen = {
            trial: before[trial] if trial in before and before[trial][0] == beat else (beat, now)
            for trial, beat in last.items()
        }
        return [trial for trial, (_, since) in self._seen.items() if now - since > self._heartbeat.grace]

    def get_heartbeat_interval(self) -> int | None:
        return self._heartbeat.interval  # type: ignore[return-value]

    def get_heartbeat_stale_trial_callback(self) -> None:
        return None


class _JournalLock(JournalFileOpenLock):
    """Optuna's lock, whose next holder deletes the half line that a killed worker left: Optuna cannot read past it."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), grace_period=JOURNAL_LOCK_SECONDS)
        self._journal = path

    def acquire(self) -> bool:
        locked = super().acquire()
        with self._journal.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if file.read(1) not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return locked

    def release(self) -> None:
        with contextlib.suppress(RuntimeError):  # another worker took the lock, after this one had written
            super().release()
