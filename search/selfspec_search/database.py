"""Database: Optuna's tables through SQLAlchemy, made by whichever worker comes first."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage, RDBStorage, get_storage
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

TABLE_TRIES = 10
"""Workers that start at once may make the same tables at once: all but one fail, and find them on a later try."""
PARAM_COLUMNS = ("trial_id", "param_name", "param_value", "distribution_json")
PARAMS = sqlalchemy.table("trial_params", *map(sqlalchemy.column, PARAM_COLUMNS))


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
    return isinstance(error, IntegrityError) or any(sign in str(error.orig) for sign in ("already exists", "locked"))


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
