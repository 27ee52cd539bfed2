"""Ledger: one study in a storage: its attributes, its blobs and its trials."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from selfspec.plan.draft_spec import DraftSpec
from selfspec_search.storage.retrying import RetryingStorage
from selfspec_search.storage.trial import OWNER, Running, is_gone, owner

BLOB = "blob:"


class Ledger:
    """A study, created if the storage has none of this name."""

    def __init__(self, storage: RetryingStorage, name: str) -> None:
        self.storage = storage
        self.where = f"study '{name}' in {storage.label}"
        self._study_id = storage.do(lambda raw: _create_or_find(raw, name))

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self.storage.do(lambda raw: raw.get_all_trials(self._study_id, deepcopy=False))

    def attrs(self) -> dict[str, Any]:
        """The study's attributes."""
        return self.storage.do(lambda raw: raw.get_study_user_attrs(self._study_id))

    def set(self, key: str, value: Any) -> None:
        """Write one attribute of the study."""
        self.storage.do(lambda raw: raw.set_study_user_attr(self._study_id, key, value))

    def set_blob(self, key: str, data: bytes) -> None:
        """Write bytes as one attribute."""
        self.set(BLOB + key, base64.b64encode(zlib.compress(data)).decode("ascii"))

    def start(
        self,
        draft_spec: DraftSpec,
        params: Mapping[str, str],
        distributions: Mapping[str, CategoricalDistribution],
        attrs: Mapping[str, Any] | None = None,
    ) -> Running:
        """Begin a trial, in one transaction: its parameters and its owner."""
        worker, tried = owner(), False
        template = create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs=dict(attrs or {}),
            system_attrs={OWNER: worker},
        )

        def create(raw: BaseStorage) -> int:
            nonlocal tried
            # A try whose connection was lost before the confirmation may have created the trial.
            known = _trial_of(raw, self._study_id, worker) if tried else None
            tried = True
            return raw.create_new_trial(self._study_id, template) if known is None else known._trial_id

        return Running(self.storage, self.storage.do(create), draft_spec)

    def fail_stale(self) -> None:
        """Fail the running trials whose workers died.

        Optuna's `fail_stale_trials` does the same by heartbeats alone, and warns that it is experimental.
        """
        running = [trial for trial in self.trials() if trial.state == TrialState.RUNNING]
        gone = {trial._trial_id for trial in running if is_gone(trial.system_attrs.get(OWNER, {}))}
        for trial_id in gone.union(self.storage.do(self._silent)):
            self.storage.do(lambda raw, trial_id=trial_id: _fail(raw, trial_id))  # type: ignore[misc]

    def _silent(self, raw: BaseStorage) -> list[int]:
        """Running trials without a heartbeat in the grace period."""
        return raw._get_stale_trial_ids(self._study_id) if isinstance(raw, BaseHeartbeat) else []


def blobs_of(attrs: Mapping[str, Any]) -> dict[str, bytes]:
    """The blobs among a study's attributes, by key."""
    keys = (name.removeprefix(BLOB) for name in attrs if name.startswith(BLOB))
    return {key: data for key in keys if ":" not in key and (data := blob_of(attrs, key)) is not None}


def blob_of(attrs: Mapping[str, Any], key: str) -> bytes | None:
    """The blob of this key among a study's attributes; None if there is none."""
    text = attrs.get(BLOB + key)
    if text is None:
        return None
    if isinstance(text, dict):  # an earlier release wrote pieces, and last their number
        text = "".join(attrs[f"{BLOB}{key}:{index}"] for index in range(text["pieces"]))
    return zlib.decompress(base64.b64decode(text))


def _create_or_find(raw: BaseStorage, name: str) -> int:
    try:
        return raw.create_new_study([StudyDirection.MAXIMIZE], name)
    except DuplicatedStudyError:
        return raw.get_study_id_from_name(name)


def _trial_of(raw: BaseStorage, study_id: int, worker: Mapping[str, Any]) -> FrozenTrial | None:
    """The trial of this owner, token included."""
    trials = raw.get_all_trials(study_id, deepcopy=False)
    return next((trial for trial in reversed(trials) if trial.system_attrs.get(OWNER) == worker), None)


def _fail(raw: BaseStorage, trial_id: int) -> None:
    with suppress(UpdateFinishedTrialError):  # the trial ended, or another worker failed it, in the meantime
        raw.set_trial_state_values(trial_id, TrialState.FAIL)
