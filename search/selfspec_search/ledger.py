"""Ledger: one study in a storage, its attributes and its trials, as this search keeps them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from selfspec.plan.draft_spec import Recipe
from selfspec_search.running import OWNER, Running, owner, trial_with_token
from selfspec_search.storage import Storage
from selfspec_search.watch import Watch


class Ledger:
    """A study, made if the storage has none of this name.

    Args:
        storage: where it is.
        name: of the study.
        heartbeat: seconds between signs of life of a running trial.
        grace: seconds of silence after which its worker is taken for dead.
    """

    def __init__(self, storage: Storage, name: str, *, heartbeat: float, grace: float) -> None:
        self.storage = storage
        self.where = f"study '{name}' in {storage.label}"
        self._heartbeat = heartbeat
        self._watch = Watch(storage, grace)
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

    def start(
        self,
        recipe: Recipe,
        params: Mapping[str, str],
        distributions: Mapping[str, CategoricalDistribution],
        attrs: Mapping[str, Any] | None = None,
        history: Mapping[str, Any] | None = None,
    ) -> Running:
        """Begin a trial, in one transaction: its parameters, its worker, and of which trials it is a repetition."""
        worker, tried = owner(), False
        template = create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs=dict(attrs or {}),
            system_attrs={OWNER: worker, **(history or {})},
        )

        def create(raw: BaseStorage) -> int:
            nonlocal tried
            # Where a connection was lost before the confirmation came, the trial may be there.
            known = trial_with_token(raw, self._study_id, worker["token"]) if tried else None
            tried = True
            return raw.create_new_trial(self._study_id, template) if known is None else known._trial_id

        return Running(self.storage, self.storage.do(create), recipe, self._heartbeat)

    def ends_for_dead(self, trial: FrozenTrial) -> bool:
        """End a running trial whose worker died; False if it lives, or if another worker ended the trial first."""
        if not self._watch.is_dead(trial, time.monotonic()):
            return False
        try:
            return self.storage.do(lambda raw: raw.set_trial_state_values(trial._trial_id, TrialState.FAIL))
        except UpdateFinishedTrialError:
            return False


def _create_or_find(raw: BaseStorage, name: str) -> int:
    try:
        return raw.create_new_study([StudyDirection.MAXIMIZE], name)
    except DuplicatedStudyError:
        return raw.get_study_id_from_name(name)
