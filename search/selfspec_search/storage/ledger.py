"""Ledger: one study in a storage: its attributes, its blobs and its trials."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from selfspec.plan.draft_spec import DraftSpec
from selfspec_search.storage.retrying import RetryingStorage
from selfspec_search.storage.trial import OWNER, Running, fail_trial, is_gone, owner

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
        template = create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs=dict(attrs or {}),
            system_attrs={OWNER: owner()},
        )
        trial_id = self.storage.do(lambda raw: raw.create_new_trial(self._study_id, template))
        return Running(self.storage, trial_id, draft_spec)

    def fail_stale(self) -> None:
        """Fail the running trials whose workers died.

        Optuna's `fail_stale_trials` does the same by heartbeats alone, and warns that it is experimental.
        """
        running = [trial for trial in self.trials() if trial.state == TrialState.RUNNING]
        gone = {trial._trial_id for trial in running if is_gone(trial.system_attrs.get(OWNER, {}))}
        if isinstance(self.storage.raw, BaseHeartbeat):  # memory has one worker
            gone.update(self.storage.do(lambda raw: raw._get_stale_trial_ids(self._study_id)))  # type: ignore[attr-defined]
        for trial_id in gone:
            self.storage.do(lambda raw, trial_id=trial_id: fail_trial(raw, trial_id))  # type: ignore[misc]


def blobs_of(attrs: Mapping[str, Any]) -> dict[str, bytes]:
    """The blobs among a study's attributes, by key."""
    texts = {name.removeprefix(BLOB): text for name, text in attrs.items() if name.startswith(BLOB)}
    return {key: zlib.decompress(base64.b64decode(text)) for key, text in texts.items()}


def _create_or_find(raw: BaseStorage, name: str) -> int:
    try:
        return raw.create_new_study([StudyDirection.MAXIMIZE], name)
    except DuplicatedStudyError:
        return raw.get_study_id_from_name(name)
