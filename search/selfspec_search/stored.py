"""Stored: what a storage holds of a search, for whoever reads it later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from selfspec.errors import InputError
from selfspec.plan.draft_spec import Recipe
from selfspec.plan.sublayers import SkipSet
from selfspec_search import blobs
from selfspec_search.running import RECORD
from selfspec_search.space import Space
from selfspec_search.storage_url import open_storage

STUDY = "selfspec"
"""The attribute that marks a study as ours and says what it is about."""
SHARED = "shared"
"""The attribute that names the blobs that all workers of a study need, once all are there."""
SPACE = "space"
"""The key under which the workers of a study share it."""
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True, kw_only=True)
class StoredTrial:
    """A finished trial.

    Attributes:
        number: of the trial in its study.
        recipe: what was tried.
        value: the predicted speedup; None if the trial was pruned.
        record: what the study noted about it.
    """

    number: int
    recipe: Recipe
    value: float | None
    record: Mapping[str, Any]

    @property
    def skip_set(self) -> SkipSet:
        return self.recipe.skip_set

    @classmethod
    def of(cls, trial: FrozenTrial, space: Space) -> StoredTrial:
        """From Optuna's own."""
        return cls(
            number=trial.number,
            recipe=space.from_params(trial.params),
            value=trial.value if trial.state == TrialState.COMPLETE else None,
            record=trial.user_attrs.get(RECORD, {}),
        )


@dataclass(frozen=True, kw_only=True)
class StoredStudy:
    """A study, as a storage holds it.

    Attributes:
        name: of the study.
        identity: what its workers agree on.
        space: what there was to choose from.
        trials: the finished ones, by number.
        blobs: what its workers share, or found out for all.
    """

    name: str
    identity: Mapping[str, Any]
    space: Space
    trials: list[StoredTrial]
    blobs: Mapping[str, bytes] = field(repr=False)

    @property
    def num_layers(self) -> int:
        return self.space.num_layers


def study_names(storage: str) -> list[str]:
    """The studies of this search that a storage holds; `InputError` if it cannot be read. Nothing is written."""
    opened = open_storage(storage, on_notice=lambda _: None, create=False)
    try:
        return opened.do(_names)
    finally:
        opened.close()


def load_study(storage: str, name: str | None = None) -> StoredStudy:
    """Read a study; nothing is written.

    Args:
        storage: as `Store.open` takes it.
        name: of the study; None if the storage holds just one.

    Raises:
        InputError: the storage cannot be read, or holds no such study; the message names those it holds.
    """
    opened = open_storage(storage, on_notice=lambda _: None, create=False)
    try:
        chosen = _choose(opened.do(_names), name, opened.label)
        return opened.do(lambda raw: _read(raw, chosen))
    finally:
        opened.close()


def _names(raw: BaseStorage) -> list[str]:
    return [study.study_name for study in raw.get_all_studies() if STUDY in study.user_attrs]


def _choose(names: list[str], name: str | None, label: str) -> str:
    held = ", ".join(f"'{each}'" for each in names)
    if not names:
        raise InputError(f"storage '{label}' holds no study of selfspec search; give the storage of a search")
    if name is None and len(names) > 1:
        raise InputError(f"storage '{label}' holds several studies: {held}; choose one with --study")
    if name is not None and name not in names:
        raise InputError(f"storage '{label}' has no study '{name}'; it holds {held}: choose one with --study")
    return name or names[0]


def _read(raw: BaseStorage, name: str) -> StoredStudy:
    study_id = raw.get_study_id_from_name(name)
    attrs = raw.get_study_user_attrs(study_id)
    trials = [t for t in raw.get_all_trials(study_id, deepcopy=False, states=FINISHED) if t.params]
    shared = {key: blobs.from_attrs(key, attrs) for key in blobs.keys_of(attrs)}
    kept = shared.get(SPACE)
    space = Space(num_layers=attrs[STUDY]["num_layers"]) if kept is None else Space.from_bytes(kept)
    return StoredStudy(
        name=name,
        identity=attrs[STUDY]["identity"],
        space=space,
        trials=[StoredTrial.of(trial, space) for trial in trials],
        blobs={key: data for key, data in shared.items() if data is not None},
    )
