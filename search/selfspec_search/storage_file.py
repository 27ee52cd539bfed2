"""Storage files: SQLite on one machine, a journal on a shared file system; checked before Optuna sees them."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.engine import URL

from selfspec.errors import InputError
from selfspec_search.database import AwayError, is_lock, open_database

LOCK_SECONDS = 1.0
"""SQLite: so long one try waits for the others, each of which holds the file for milliseconds. It waits deaf to ctrl-C,
which strikes between tries."""
JOURNAL_LOCK_SECONDS = 8
"""Journal: a lock held for so long was left by a worker that was killed; others hold it for milliseconds. Until then
nobody can write heartbeats, so that it must be well under the time after which a silent worker is taken for dead."""
SQLITE_MAGIC = b"SQLite format 3\x00"
JOURNAL_MAGIC = b'{"op_code":'
DAMAGE = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""What Optuna raises over lines of a journal that are no lines of its own."""
TAIL = 1 << 16
"""Bytes read at once when looking for the end of a journal's last whole line."""


def open_sqlite(path: Path, label: str, create: bool) -> BaseStorage:
    """An SQLite file; `InputError` if it is none, belongs to another program, or cannot be written."""
    if _existing(path, label, create):
        _check_sqlite(path, label)
    url = URL.create("sqlite", database=str(path))
    storage = open_database(url, create, {"connect_args": {"timeout": LOCK_SECONDS}})
    if create:
        _lock_before_reading(storage._backend.engine)  # type: ignore[attr-defined]
    return storage


def open_journal(path: Path, label: str, create: bool) -> BaseStorage:
    """A journal file; `InputError` if it is none, or cannot be written."""
    if _existing(path, label, create):
        with path.open("rb") as file:
            head = file.read(len(JOURNAL_MAGIC))
        if not JOURNAL_MAGIC.startswith(head):
            raise InputError(f"storage '{label}' is no journal of Optuna's; give another file")
    try:
        # The lock's path is absolute already: it must not depend on where a worker was started.
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_JournalLock(path)))
    except DAMAGE as error:
        raise InputError(f"storage '{label}' is damaged: a line of it cannot be read; give another file") from error


def _existing(path: Path, label: str, create: bool) -> bool:
    """Whether the file is there, with something in it; `InputError` if it can be neither used nor made."""
    if path.is_dir():
        raise InputError(f"storage '{label}' is a directory; give a file in it")
    if path.exists() and not path.is_file():
        raise InputError(f"storage '{label}' is a device or a pipe; give an ordinary file")
    if not path.parent.is_dir():
        raise InputError(f"storage '{label}': there is no directory {path.parent}; make it, or give another file")
    if not path.exists() and not create:
        raise InputError(f"storage '{label}' does not exist; give the file that a search wrote")
    # Both kinds lay a second file beside the first while they write.
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
        with contextlib.closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error as error:
        if is_lock(error):
            raise AwayError(str(error)) from error
        raise InputError(f"storage '{label}' cannot be used: {error}; mend that, or give another storage") from error
    if tables and not tables & {"studies", "trials", "version_info"}:
        raise InputError(
            f"storage '{label}' is another program's database (it has a table '{min(tables)}'); give another"
        )


def _lock_before_reading(engine: sqlalchemy.Engine) -> None:
    """Begin each transaction as a writer, so that what it has read still holds when it writes.

    SQLite would otherwise let two workers read the same state of a trial, and both change it.
    """

    def begin_by_hand(connection: Any, _: object) -> None:
        connection.isolation_level = None

    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # of connections that were made before
    sqlalchemy.event.listen(engine, "connect", begin_by_hand)
    sqlalchemy.event.listen(engine, "begin", begin)


class _JournalLock(JournalFileOpenLock):
    """Optuna's lock by exclusive creation, which holds on NFS, with a look at how the journal ends.

    A worker killed while it wrote leaves half a line, over which every later reader would stumble: whoever locks next
    cuts it off.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), grace_period=JOURNAL_LOCK_SECONDS)
        self._journal = path

    def acquire(self) -> bool:
        locked = super().acquire()
        try:
            _cut_half_line(self._journal)
        except BaseException:
            self.release()
            raise
        return locked

    def release(self) -> None:
        # A lock held for very long is taken away. What was to be written under it is written by now.
        with contextlib.suppress(RuntimeError):
            super().release()


def _cut_half_line(path: Path) -> None:
    with path.open("rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read(1) in (b"", b"\n"):
            return
        newline = -1
        while end and newline < 0:
            start = max(0, end - TAIL)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start + newline + 1
        file.truncate(end)
