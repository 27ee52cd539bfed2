"""Errors: what an error of a database driver or of the operating system means for a storage."""

from __future__ import annotations

import errno
import sqlite3

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout


class UnavailableError(Exception):
    """The database is locked or the connection is lost; the cause is the driver's error.

    Optuna itself retries some calls five times after an error of SQLAlchemy, and delays ctrl-C meanwhile. Optuna does
    not retry after this error.
    """


STORAGE_ERRORS = (UnavailableError, StorageInternalError, SQLAlchemyError, OSError)
"""What Optuna's storages raise when they cannot be read or written."""
POSTGRES_LOCK_STATES = frozenset({"55P03", "40P01"})
"""PostgreSQL's codes for a lock timeout and for a deadlock."""
TRANSIENT_ERRNOS = frozenset({errno.EAGAIN, errno.EIO, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ENOLCK})
"""What a shared file system raises while its server is away."""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: the connection is lost or refused, or the storage is locked."""
    if isinstance(error, StorageInternalError):
        return error.__cause__ is not None and is_transient(error.__cause__)
    if isinstance(error, OSError):
        return error.errno in TRANSIENT_ERRNOS
    if isinstance(error, UnavailableError | PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if isinstance(error.orig, sqlite3.Error):  # SQLite has one type for all errors, and most of them are permanent
        return is_locked(error)
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)


def is_locked(error: BaseException) -> bool:
    """Whether another connection, of any program, holds what this connection needs."""
    cause = cause_of(error)
    if isinstance(cause, sqlite3.Error):
        return "locked" in str(cause)
    return not POSTGRES_LOCK_STATES.isdisjoint((getattr(cause, "sqlstate", None), getattr(cause, "pgcode", None)))


def describe(label: str, error: BaseException) -> str:
    """What is wrong with the storage of this label, in one line."""
    problem = "is locked by another program" if is_locked(error) else "cannot be used"
    return f"storage '{label}' {problem}: {reason_of(error)}"


def reason_of(error: BaseException) -> str:
    """The first line of the driver's or the system's message."""
    cause = cause_of(error)
    message = str(getattr(cause, "strerror", None) or cause).strip()
    return message.splitlines()[0].rstrip(".") if message else type(cause).__name__


def cause_of(error: BaseException) -> BaseException:
    """The error of the driver or the system that another error wraps."""
    if isinstance(error, StorageInternalError | UnavailableError) and error.__cause__ is not None:
        return cause_of(error.__cause__)
    return getattr(error, "orig", None) or error
