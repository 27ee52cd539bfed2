"""Database: Optuna's storage in PostgreSQL or in an SQLite file, with locks and heartbeats for several workers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.trial import FrozenTrial
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from selfspec_search.storage.errors import UnavailableError, is_locked
from selfspec_search.storage.trial import Heartbeat

SQLITE_LOCK_SECONDS = 1.0
"""Seconds: one try waits this long for a lock, and ctrl-C with it. Workers hold the file for milliseconds."""
TABLE_TRIES = 10
"""Tries: of workers that create the same tables at once, all but one fail, and find the tables on a later try."""
POSTGRES_CONNECT = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}
"""Seconds, and for `tcp_user_timeout` milliseconds: a silent host counts as lost after about a minute.

The system's defaults are minutes to hours."""
POSTGRES_SESSION = {"lock_timeout": 5_000, "idle_in_transaction_session_timeout": 60_000, "TimeZone": "UTC"}
"""Milliseconds: the server ends a long wait for a lock, so that ctrl-C works, and the transaction of a stopped worker.

Optuna's heartbeats need one time zone for all workers."""
PARAM_COLUMNS = ("trial_id", "param_name", "param_value", "distribution_json")
PARAMS = sqlalchemy.table("trial_params", *map(sqlalchemy.column, PARAM_COLUMNS))
HEARTBEATS = sqlalchemy.table("trial_heartbeats", *map(sqlalchemy.column, ("trial_id", "heartbeat")))


def open_postgresql(url: URL, create: bool, heartbeat: Heartbeat) -> BaseStorage:
    """Optuna's storage, through psycopg. `pool_pre_ping` replaces connections that a restarted server closed."""
    ours = " ".join(f"-c {name}={value}" for name, value in POSTGRES_SESSION.items())
    given = url.query.get("options", os.environ.get("PGOPTIONS", ""))
    query = {**POSTGRES_CONNECT, **url.query, "options": f"{ours} {given}"}  # for each name, the last value counts
    return _open(url.set(drivername="postgresql+psycopg", query=query), create, {"pool_pre_ping": True}, heartbeat)


def open_sqlite(path: Path, create: bool, heartbeat: Heartbeat) -> BaseStorage:
    """Optuna's storage in a file."""
    url = URL.create("sqlite", database=str(path))
    storage = _open(url, create, {"connect_args": {"timeout": SQLITE_LOCK_SECONDS}}, heartbeat)
    if create:
        _lock_before_reading(storage._backend.engine)  # type: ignore[attr-defined]
    return storage


def _open(url: URL, create: bool, options: dict[str, Any], heartbeat: Heartbeat) -> BaseStorage:
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

    Optuna reads twice for each parameter, to check that all trials have the same choices. Ours always do. Without these
    reads a trial of 60 sub-layers begins in 15 ms instead of 64 ms, in an SQLite file.
    """

    def __init__(self, url: str, heartbeat: Heartbeat, **options: Any) -> None:
        try:
            super().__init__(url, **options)
        except BaseException:
            if hasattr(self, "engine"):  # nobody else can close the engine's connections
                self.scoped_session.remove()
                self.engine.dispose()
            raise
        # As arguments, they would make Optuna warn of an experimental feature.
        self.heartbeat_interval, self.grace_period = heartbeat  # type: ignore[assignment]
        sqlalchemy.event.listen(self.engine, "handle_error", _raise_unavailable)

    def _get_prepared_new_trial(self, study_id: int, template: FrozenTrial | None, session: Session) -> Any:
        """Write the first heartbeat: a trial without one never becomes stale, even if its worker is killed."""
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
