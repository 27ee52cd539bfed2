"""Storage: one of Optuna's storages, which outlives lost connections and fails in one line."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from selfspec.errors import InputError
from selfspec_search.interrupts import hold_back

T = TypeVar("T")

PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0)
"""Seconds between tries after a lost connection: a minute in all, in which a database server restarts."""
STORAGE_ERRORS = (StorageInternalError, SQLAlchemyError, OSError)
"""What Optuna's storages raise when they cannot be read or written."""
TRANSIENT_ERRNOS = frozenset({errno.EAGAIN, errno.EIO, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ENOLCK})
"""What a shared file system answers while its server is away."""


class Storage:
    """An Optuna storage whose calls are tried again while its connection is lost.

    Args:
        raw: Optuna's storage.
        label: what to call it in messages: the path or URL as given, without a password.
        on_notice: told, in one line, of each wait for a lost connection.
    """

    def __init__(self, raw: BaseStorage, label: str, on_notice: Callable[[str], None]) -> None:
        self.raw = raw
        self.label = label
        self.on_notice = on_notice
        self.outages = 0
        """How often the connection was found lost."""
        self._given_up = False

    def do(self, action: Callable[[BaseStorage], T]) -> T:
        """Run `action` on the storage; `InputError` if it fails for good, or its connection stays lost for a minute."""
        for pause in () if self._given_up else PAUSES:
            try:
                return self._once(action)
            except STORAGE_ERRORS as error:
                if not is_transient(error):
                    raise self._failed(error) from error
                self.outages += 1
                lost = f"the connection to storage '{self.label}' was lost ({reason_of(error)})"
                self.on_notice(f"{lost}; trying again in {pause:g} s")
            time.sleep(pause)
        try:
            return self._once(action)
        except STORAGE_ERRORS as error:
            raise self._failed(error) from error

    def _once(self, action: Callable[[BaseStorage], T]) -> T:
        try:
            with hold_back():
                return action(self.raw)
        except KeyError as error:
            raise InputError(
                f"the study is no longer in storage '{self.label}': somebody deleted it; choose another --study"
            ) from error

    def _failed(self, error: Exception) -> InputError:
        self._given_up = True  # what is still written on the way out is tried once
        return InputError(
            f"storage '{self.label}' cannot be used any more: {reason_of(error)}; what was finished is kept: "
            "give the same command again to go on"
        )

    def close(self) -> None:
        """Close the connections of this process."""
        engine = getattr(getattr(self.raw, "_backend", self.raw), "engine", None)
        if engine is not None:
            engine.dispose()


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: a lost or refused connection, a lock held too long."""
    if isinstance(error, StorageInternalError):
        return error.__cause__ is not None and is_transient(error.__cause__)
    if isinstance(error, OSError):
        return error.errno in TRANSIENT_ERRNOS
    if not isinstance(error, DBAPIError):
        return isinstance(error, PoolTimeout)
    if type(error.orig).__module__ == "sqlite3":  # all of SQLite's troubles have one type, and most of them last
        return "locked" in str(error.orig)
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)


def reason_of(error: BaseException) -> str:
    """The first line of what the database or the system said."""
    if isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    said = getattr(error, "orig", None) or getattr(error, "strerror", None) or error
    return str(said).strip().splitlines()[0].rstrip(".") if str(said).strip() else type(error).__name__
