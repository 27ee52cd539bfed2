"""Storage URLs: from a path or URL to an open storage, and one clear line where that fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, InMemoryStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from selfspec.errors import InputError
from selfspec_search.database import open_database
from selfspec_search.storage import STORAGE_ERRORS, Storage, is_locked, patiently, reason_of, trouble
from selfspec_search.storage_file import open_journal, open_sqlite

JOURNAL_SCHEME, JOURNAL_SUFFIX = "journal://", ".journal"
VERSION_TABLE = "version_info"
"""The table that Optuna looks for first."""
POSTGRES_DRIVERS = ("psycopg", "psycopg2")
POSTGRES_CONNECT = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
"""A host that does not answer is given up after seconds, not after the minutes or hours of the system's defaults."""
POSTGRES_SESSION = {"lock_timeout": 5_000, "idle_in_transaction_session_timeout": 60_000}
"""In milliseconds: a worker that was stopped or cut off in a transaction holds its locks until the server ends it. One
try waits for a lock deaf to ctrl-C, which strikes between tries."""


def open_storage(storage: str | None, *, on_notice: Callable[[str], None], create: bool = True) -> Storage:
    """Open a storage.

    Args:
        storage: None for memory; a path ending in '.journal', or 'journal://PATH', for a journal file; any other path
            for an SQLite file; else a URL for SQLAlchemy. 'postgresql://' takes the driver that is installed.
        on_notice: told of locks and lost connections.
        create: whether to make what is not there yet. If not, nothing is written.

    Raises:
        InputError: the storage cannot be used; the message says why and what to do.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # notices tell of the same, in one line
    if storage is None:
        return Storage(InMemoryStorage(), "memory", on_notice)
    label, opener = _opener(storage, create)
    try:
        return Storage(patiently(opener, is_locked, label, on_notice), label, on_notice)
    except ImportError as error:
        raise _no_driver(storage.partition("://")[0]) from error
    except (RuntimeError, *STORAGE_ERRORS) as error:  # Optuna's RuntimeError names the command that upgrades old tables
        if not create and VERSION_TABLE in reason_of(error):
            raise InputError(f"storage '{label}' holds no study of any kind; give the storage of a search") from error
        raise InputError(f"{trouble(label, error)}; mend that, or give another storage") from error


def without_password(storage: str) -> str:
    """The path or URL as it may be shown."""
    if "://" not in storage:
        return storage
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return storage.partition("://")[0] + "://…"


def _opener(storage: str, create: bool) -> tuple[str, Callable[[], BaseStorage]]:
    """What to call the storage in messages, and what opens it."""
    if storage.startswith(JOURNAL_SCHEME) or ("://" not in storage and storage.endswith(JOURNAL_SUFFIX)):
        journal = _path(storage.removeprefix(JOURNAL_SCHEME), storage)
        return storage, lambda: open_journal(journal, storage, create)
    url = _parsed(storage) if "://" in storage else URL.create("sqlite", database=storage)
    if url.get_backend_name() == "sqlite":
        file = _path(url.database or "", storage)
        return storage, lambda: open_sqlite(file, storage, create)
    return url.render_as_string(hide_password=True), lambda: open_database(url, create, _options(url))


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
        url = _with_driver(make_url(storage))
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


def _with_driver(url: URL) -> URL:
    """PostgreSQL without a named driver: whichever is installed."""
    if url.drivername not in ("postgresql", "postgres"):
        return url
    driver = next((name for name in POSTGRES_DRIVERS if find_spec(name)), None)
    if driver is None:
        raise _no_driver(url.drivername)
    return url.set(drivername=f"postgresql+{driver}")


def _no_driver(scheme: str) -> InputError:
    what = "pip install 'selfspec[postgresql]'" if scheme.startswith("postgres") else "install it with pip"
    return InputError(f"storage: the Python driver for {scheme} is not installed; {what}")


def _options(url: URL) -> dict[str, object]:
    """What the engine is made with: a pool that replaces the connections that a restarted server closed."""
    if url.get_driver_name() not in POSTGRES_DRIVERS:
        return {"pool_pre_ping": True}
    connect = {name: value for name, value in POSTGRES_CONNECT.items() if name not in url.query}
    return {"pool_pre_ping": True, "connect_args": connect | {"options": _session(url)}}


def _session(url: URL) -> str:
    """Settings of a session: ours, then those of the user, of which the last ones hold."""
    given = url.query.get("options", os.environ.get("PGOPTIONS", ""))
    ours = [f"-c {name}={value}" for name, value in POSTGRES_SESSION.items()]
    return " ".join([*ours, *([given] if isinstance(given, str) else given)])
