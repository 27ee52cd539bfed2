"""Storage: one of Optuna's storages, which outlives locks and lost connections and fails in one line."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from itertools import chain, repeat
from typing import TypeVar

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from selfspec.errors import InputError
from selfspec_search.database import AwayError, is_lock
from selfspec_search.interrupts import hold_back

T = TypeVar("T")

PATIENCE_SECONDS = 90.0
"""So long a call is tried again: in it a database server restarts, or ends the transaction of a worker cut off."""
PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between tries after a lost connection; the last again and again."""
LOCK_PAUSE_SECONDS = 0.1
"""Between tries for a lock: each of them has waited for it already."""
LOCK_NOTICE_SECONDS = 5.0
"""A lock held for less is no news: workers that are many or slow hold each other up."""
STALL_SECONDS = 5.0
"""What held one call up for longer may have held up other workers, and their heartbeats."""
STORAGE_ERRORS = (AwayError, StorageInternalError, SQLAlchemyError, OSError)
"""What Optuna's storages raise when they cannot be read or written."""
TRANSIENT_ERRNOS = frozenset({errno.EAGAIN, errno.EIO, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ENOLCK})
"""What a shared file system answers while its server is away."""


class Storage:
    """An Optuna storage whose calls are tried again while it is locked, or its connection lost.

    Args:
        raw: Optuna's storage.
        label: what to call it in messages: the path or URL as given, without a password.
        on_notice: told, in one line, of each wait that is worth telling.
    """

    def __init__(self, raw: BaseStorage, label: str, on_notice: Callable[[str], None]) -> None:
        self.raw = raw
        self.label = label
        self.on_notice = on_notice
        self.outages = 0
        """How often writes were found held up, by a lost connection or for long."""
        self._given_up = False

    def do(self, action: Callable[[BaseStorage], T]) -> T:
        """Run `action` on the storage; `InputError` if it fails for good, or stays locked or away for too long."""
        began = time.monotonic()
        patience = 0.0 if self._given_up else PATIENCE_SECONDS
        try:
            return patiently(lambda: self._once(action), self._passes, self.label, self.on_notice, patience)
        except STORAGE_ERRORS as error:
            self._given_up = True  # what is still written on the way out is tried once
            raise InputError(
                f"{trouble(self.label, error)}; what was finished is kept: give the same command again to go on"
            ) from error
        finally:
            self.outages += time.monotonic() - began > STALL_SECONDS

    def _once(self, action: Callable[[BaseStorage], T]) -> T:
        try:
            return action(self.raw)
        except KeyError as error:
            raise InputError(
                f"the study is no longer in storage '{self.label}': somebody deleted it; choose another --study"
            ) from error

    def _passes(self, error: Exception) -> bool:
        passes = is_transient(error)
        self.outages += passes and not is_locked(error)
        return passes

    def close(self) -> None:
        """Close the connections of this process."""
        engine = getattr(getattr(self.raw, "_backend", self.raw), "engine", None)
        if engine is not None:
            engine.dispose()


def patiently(
    call: Callable[[], T],
    passes: Callable[[Exception], bool],
    label: str,
    on_notice: Callable[[str], None],
    seconds: float | None = None,
) -> T:
    """What `call` returns, tried again while its errors pass; ctrl-C strikes between tries.

    Args:
        call: uses a storage; raises one of `STORAGE_ERRORS` where it cannot.
        passes: whether after such an error the same call may succeed.
        label: of the storage.
        on_notice: told once of the wait.
        seconds: after so many the next error is raised, even one that passes; None for `PATIENCE_SECONDS`.
    """
    seconds = PATIENCE_SECONDS if seconds is None else seconds
    began, pauses, told = time.monotonic(), chain(PAUSES, repeat(PAUSES[-1])), False
    while True:
        try:
            with hold_back():
                return call()
        except STORAGE_ERRORS as error:
            waited, locked = time.monotonic() - began, is_locked(error)
            if not passes(error) or waited >= seconds:
                raise
            if not told and (waited >= LOCK_NOTICE_SECONDS or not locked):
                lost = f"the connection to storage '{label}' was lost ({reason_of(error)})"
                on_notice(f"{trouble(label, error) if locked else lost}; trying again for {seconds:g} s")
                told = True
        time.sleep(LOCK_PAUSE_SECONDS if locked else next(pauses))


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: a lost or refused connection, a lock held too long."""
    if isinstance(error, StorageInternalError):
        return error.__cause__ is not None and is_transient(error.__cause__)
    if isinstance(error, OSError):
        return error.errno in TRANSIENT_ERRNOS
    if isinstance(error, AwayError | PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if type(error.orig).__module__ == "sqlite3":  # all of SQLite's troubles have one type, and most of them last
        return is_lock(error.orig)
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)


def is_locked(error: BaseException) -> bool:
    """Whether another connection, of whatever program, held what this one wanted."""
    return is_lock(cause_of(error))


def trouble(label: str, error: BaseException) -> str:
    """What is the matter with a storage."""
    problem = "is locked by another program" if is_locked(error) else "cannot be used"
    return f"storage '{label}' {problem}: {reason_of(error)}"


def reason_of(error: BaseException) -> str:
    """The first line of what the database or the system said."""
    cause = cause_of(error)
    said = str(getattr(cause, "strerror", None) or cause).strip()
    return said.splitlines()[0].rstrip(".") if said else type(cause).__name__


def cause_of(error: BaseException) -> BaseException:
    """The error of the driver or the system that another one wraps."""
    if isinstance(error, StorageInternalError | AwayError) and error.__cause__ is not None:
        return cause_of(error.__cause__)
    return getattr(error, "orig", None) or error
