"""Open: from a path or URL to an open storage; a failure takes one clear line."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, InMemoryStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from selfspec.errors import InputError
from selfspec_search.storage import database
from selfspec_search.storage.errors import STORAGE_ERRORS, describe
from selfspec_search.storage.journal import Journal
from selfspec_search.storage.retrying import RetryingStorage, retry
from selfspec_search.storage.trial import Heartbeat

JOURNAL_SCHEME, JOURNAL_SUFFIX, JOURNAL_START = "journal://", ".journal", b'{"op_code":'
JOURNAL_DAMAGE = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""What Optuna raises for lines of a journal that Optuna did not write."""
POSTGRES_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")


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
            for an SQLite file; else a URL such as 'postgresql://USER:PASSWORD@HOST/DATABASE'.
        on_notice: receives lines about locks and lost connections.
        create: whether to create a missing file and missing tables. If not, nothing is written.
        heartbeat: how running trials show that their workers are alive.

    Raises:
        InputError: the storage cannot be used; the message says why and what to do.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # `on_notice` receives the same in one line
    if storage is None:
        return RetryingStorage(InMemoryStorage(), "memory", on_notice)
    label = without_password(storage)
    opener = _opener(storage, label, create, heartbeat or Heartbeat())
    try:
        return RetryingStorage(retry(opener, label, on_notice), label, on_notice)
    except ImportError as error:
        raise InputError("storage: PostgreSQL needs a driver; pip install 'selfspec[postgresql]'") from error
    except (RuntimeError, *STORAGE_ERRORS) as error:  # Optuna's RuntimeError names the command that upgrades old tables
        problem = describe(label, error)
        if not create and "version_info" in problem:  # the table that Optuna reads first
            problem = f"storage '{label}' holds no study of any kind"
        raise InputError(f"{problem}; correct this, or give another storage") from error


def without_password(storage: str) -> str:
    """The path or URL for messages and pages, without its password."""
    if "://" not in storage or storage.startswith(JOURNAL_SCHEME):
        return storage
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return storage.partition("://")[0] + "://…"


def _opener(storage: str, label: str, create: bool, heartbeat: Heartbeat) -> Callable[[], BaseStorage]:
    """The function that opens the storage."""
    if storage.startswith(JOURNAL_SCHEME) or ("://" not in storage and storage.endswith(JOURNAL_SUFFIX)):
        journal = _path(storage.removeprefix(JOURNAL_SCHEME), label)
        return lambda: _open_journal(journal, label, create, heartbeat)
    scheme = storage.partition("://")[0]
    try:
        url = make_url(storage) if "://" in storage else URL.create("sqlite", database=storage)
    except (ArgumentError, ValueError) as error:
        raise InputError(
            f"storage: the URL after '{scheme}://' cannot be read; write {scheme}://USER:PASSWORD@HOST:PORT/DATABASE, "
            "with special characters in the password as %XX"
        ) from error
    if url.get_backend_name() == "sqlite":
        file = _path(url.database or "", label)
        return lambda: _open_sqlite(file, label, create, heartbeat)
    if url.drivername not in POSTGRES_SCHEMES:
        raise InputError(
            f"storage: '{scheme}' is not a database that a search can use; give a file, journal://PATH or "
            "postgresql://USER:PASSWORD@HOST/DATABASE"
        )
    return lambda: database.open_postgresql(url, create, heartbeat)


def _path(path: str, label: str) -> Path:
    if path in ("", ":memory:"):
        raise InputError(f"storage '{label}' names no file; give a path, or no storage to keep trials in memory")
    return Path(os.path.expanduser(path)).absolute()


def _open_sqlite(path: Path, label: str, create: bool, heartbeat: Heartbeat) -> BaseStorage:
    if _is_written(path, label, create):
        with contextlib.closing(sqlite3.connect(path, timeout=database.SQLITE_LOCK_SECONDS)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and not tables & {"studies", "trials", "version_info"}:
            raise InputError(
                f"storage '{label}' is another program's database (it has a table '{min(tables)}'); give another file"
            )
    return database.open_sqlite(path, create, heartbeat)


def _open_journal(path: Path, label: str, create: bool, heartbeat: Heartbeat) -> BaseStorage:
    if _is_written(path, label, create):
        with path.open("rb") as file:
            if not JOURNAL_START.startswith(file.read(len(JOURNAL_START))):
                raise InputError(f"storage '{label}' is not a journal of Optuna; give another file")
    try:
        return Journal(path, heartbeat)
    except JOURNAL_DAMAGE as error:
        raise InputError(f"storage '{label}' is damaged: one of its lines cannot be read; give another file") from error


def _is_written(path: Path, label: str, create: bool) -> bool:
    """Whether the file exists and is not empty; `InputError` if it can be neither used nor created."""
    exists = path.exists()
    if exists and not path.is_file():
        raise InputError(f"storage '{label}' is a directory, a device or a pipe; give an ordinary file")
    if not path.parent.is_dir():
        raise InputError(f"storage '{label}': there is no directory {path.parent}; make it, or give another file")
    if not exists and not create:
        raise InputError(f"storage '{label}' does not exist; give the file that a search wrote")
    mode = os.W_OK if create else os.R_OK  # SQLite and journals both create a second file next to the file
    if not all(os.access(place, mode) for place in (path.parent, path) if place.exists()):
        raise InputError(
            f"storage '{label}' may not be {'written' if create else 'read'}: the file or its directory is protected; "
            "give a file elsewhere, or change its permissions"
        )
    return exists and path.stat().st_size > 0
