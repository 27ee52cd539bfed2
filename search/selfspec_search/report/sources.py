"""Sources: the data of a report, read from a plan or from a study's storage."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfspec.errors import InputError
from selfspec.plan.plan import PLAN_FILE, Plan
from selfspec_search.report.data import ReportData, StudyData, Trial, number
from selfspec_search.space import Sublayer, sublayers

SQLITE_MAGIC = b"SQLite format 3\x00"
JOURNAL_SUFFIX = ".journal"
SENSITIVITY = "sensitivity"
"""The study's key of sensitivity: agreement when one sub-layer alone is skipped, as JSON."""


def read_source(source: str, *, study: str | None = None, plan: str | os.PathLike[str] | None = None) -> ReportData:
    """Read a plan or a study.

    Args:
        source: a plan file, or a directory with a plan; its study is read from 'plan.db' next to 'plan.json', if that
            exists. Or a study's storage: an SQLite file, a journal file or a URL.
        study: the study's name; needed only if the storage holds several studies.
        plan: the chosen plan, to show in a study's report.

    Raises:
        InputError: the source is neither a plan nor a storage, or the storage does not hold the study.
        PlanError: the plan cannot be read.
    """
    if is_storage(source):
        from selfspec_search.storage.open import without_password

        chosen = Plan.from_pretrained(plan) if plan is not None else None
        return ReportData(source=without_password(source), plan=chosen, study=_read_study(source, study))
    if plan is not None:
        raise InputError(f"'{source}' is a plan, and --plan gives another plan, {plan}; leave out --plan")
    return _read_plan(Path(source), study)


def is_storage(source: str) -> bool:
    """Whether `source` names a storage rather than a plan; `InputError` for a file that is neither."""
    if "://" in source:
        return True
    path = Path(source)
    if os.path.isdir(path):
        return False
    try:
        with path.open("rb") as file:
            start = file.read(len(SQLITE_MAGIC))
    except FileNotFoundError:
        raise InputError(f"there is no file '{source}'; give a plan, an SQLite file of a search, or its URL") from None
    except OSError as error:
        raise InputError(f"'{source}' cannot be read: {error.strerror or error}; give another file") from None
    if start == SQLITE_MAGIC or path.suffix == JOURNAL_SUFFIX:
        return True
    if not start.lstrip().startswith(b"{"):
        raise InputError(
            f"'{source}' is neither a plan (JSON) nor a study's storage (an SQLite or journal file); give one of these"
        )
    return False


def _read_plan(path: Path, study: str | None) -> ReportData:
    plan = Plan.from_pretrained(path)
    file = path / PLAN_FILE if os.path.isdir(path) else path
    storage = file.with_suffix(".db")
    if not storage.is_file():
        if study is not None:
            raise InputError(
                f"there is no storage {storage} next to the plan, so study '{study}' cannot be read; "
                "give the study's storage instead of the plan"
            )
        return ReportData(source=str(file), plan=plan)
    recorded = getattr(plan.provenance, "study", None)
    return ReportData(source=str(file), plan=plan, study=_read_study(str(storage), study or recorded))


def _read_study(storage: str, name: str | None) -> StudyData:
    from selfspec_search.storage.study_store import load_study

    try:
        stored = load_study(storage, name)
    except sqlite3.DatabaseError as error:
        raise InputError(f"storage '{storage}' cannot be read: {error}; give another file") from None
    return StudyData(
        name=stored.name,
        trials=[Trial.of(trial) for trial in stored.trials],
        num_layers=stored.space.num_layers,
        identity=stored.identity,
        sensitivity=_sensitivity(stored.blobs.get(SENSITIVITY), stored.space.num_layers),
    )


def _sensitivity(data: bytes | None, num_layers: int) -> Mapping[Sublayer, float]:
    """The sensitivity, or nothing if the record is malformed: the page then shows the trials."""
    try:
        given: Any = json.loads(data) if data else {}
    except ValueError:
        given = {}
    named = given if isinstance(given, Mapping) else {}
    values = {(kind, layer): number(named, f"{kind}_{layer}") for kind, layer in sublayers(num_layers)}
    return {sublayer: value for sublayer, value in values.items() if value is not None}
