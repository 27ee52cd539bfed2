"""Errors: what an error of a database driver or of the operating system means for a storage."""

from __future__ import annotations

import errno
import sqlite3

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError


class UnavailableError(Exception):
    """The database is locked or the connection is lost; the cause is the driver's error.

    After an error of SQLAlchemy, Optuna itself tries some calls five times and delays ctrl-C. It does not after this.
    """


STORAGE_ERRORS = (UnavailableError, StorageInternalError, SQLAlchemyError, sqlite3.Error, OSError)
"""What Optuna's storages raise when they cannot be read or written."""
POSTGRES_LOCK_STATES = ("55P03", "40P01")
"""PostgreSQL's codes for a lock timeout and for a deadlock."""
TRANSIENT_ERRNOS = (errno.EAGAIN, errno.EIO, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ENOLCK)
"""What a shared file system raises while its server is away."""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, OSError):
        return error.errno in TRANSIENT_ERRNOS
    return isinstance(error, UnavailableError) or is_locked(error)


def is_locked(error: BaseException) -> bool:
    """Whether another connection, of any program, holds what this connection needs."""
    cause = cause_of(error)
    if isinstance(cause, sqlite3.Error):
        return "locked" in str(cause)
    return getattr(cause, "sqlstate", None) in POSTGRES_LOCK_STATES


def describe(label: str, error: BaseException) -> str:
    """What is wrong with the storage of this label, in one line."""
    cause = cause_of(error)
    reason = str(getattr(cause, "strerror", None) or cause).strip() or type(cause).__name__
    problem = "is locked by another program" if is_locked(error) else "cannot be used"
    return f"storage '{label}' {problem}: {reason.splitlines()[0].rstrip('.')}"


def cause_of(error: BaseException) -> BaseException:
    """The error of the driver or the system that another error wraps."""
    if isinstance(error, StorageInternalError | UnavailableError) and error.__cause__ is not None:
        return cause_of(error.__cause__)
    return getattr(error, "orig", None) or error
