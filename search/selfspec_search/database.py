"""Database: Optuna's tables through SQLAlchemy, made by whichever worker comes first."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from typing import Any

import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage, RDBStorage, get_storage
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

TABLE_TRIES = 10
"""Workers that start at once may make the same tables at once: all but one fail, and find them on a later try."""
LOCKED_STATES = frozenset({"55P03", "40P01"})
"""What PostgreSQL calls a lock that was waited for in vain, and a deadlock."""
PARAM_COLUMNS = ("trial_id", "param_name", "param_value", "distribution_json")
PARAMS = sqlalchemy.table("trial_params", *map(sqlalchemy.column, PARAM_COLUMNS))


class AwayError(Exception):
    """A database that is locked, or whose connection is lost; its cause is the driver's error.

    Optuna tries some calls of its own accord five times more, and waits in between: deaf to ctrl-C all the while. Of
    this error it knows nothing.
    """


def is_lock(error: BaseException | None) -> bool:
    """Whether a driver's error says that another connection holds what this one wants."""
    if isinstance(error, sqlite3.Error):  # all of SQLite's troubles have one type
        return "locked" in str(error)
    return not LOCKED_STATES.isdisjoint((getattr(error, "sqlstate", None), getattr(error, "pgcode", None)))


def open_database(url: URL, create: bool, options: Mapping[str, object]) -> BaseStorage:
    """Optuna's storage at `url`, with a cache of finished trials in front; `options` are for SQLAlchemy's engine."""
    # Optuna formats the URL as a template: braces that are the user's own are doubled.
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    for attempt in range(TABLE_TRIES):
        try:
            return get_storage(_Database(text, engine_kwargs=dict(options), skip_table_creation=not create))
        except DBAPIError as error:
            if attempt == TABLE_TRIES - 1 or not _was_raced(error):
                raise
            time.sleep(0.05 * (attempt + 1))
    raise AssertionError("the last try returns or raises")


def _was_raced(error: DBAPIError) -> bool:
    """Whether another worker made a table, or wrote the row that tells its version, a moment earlier."""
    return isinstance(error, IntegrityError) or "already exists" in str(error.orig)


def _tell_what_passes(context: ExceptionContext) -> None:
    """Of SQLAlchemy's errors, make those that pass our own; others mean something to Optuna."""
    if context.is_pre_ping or context.sqlalchemy_exception is None:  # None: it is a ctrl-C
        return
    error, is_connected = context.original_exception, context.connection is not None
    if context.is_disconnect or not is_connected or is_lock(error):
        raise AwayError(str(error))  # SQLAlchemy names the cause


class _Database(RDBStorage):
    """Optuna's storage, which writes the parameters of a new trial without asking first what others have.

    Optuna reads twice per parameter to see that all trials mean the same by it, as ours do; with a parameter per
    sub-layer that takes most of the time that a trial costs here. Should a release of Optuna name the method
    otherwise, its own is used, and right.
    """

    def __init__(self, url: str, **options: Any) -> None:
        try:
            super().__init__(url, **options)
        except BaseException:
            if hasattr(self, "engine"):  # nobody else could close its connections
                self.scoped_session.remove()
                self.engine.dispose()
            raise
        sqlalchemy.event.listen(self.engine, "handle_error", _tell_what_passes)

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
