"""Study store: a study's trials and shared data, for the workers of the study and for later readers.

The sampler has a study of its own: through a database, Optuna would write once per sub-layer, slower than a trial.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Self

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from selfspec.errors import InputError
from selfspec.plan.draft_spec import DraftSpec
from selfspec_search.space import Space
from selfspec_search.storage.ledger import Ledger, blobs_of
from selfspec_search.storage.open import open_storage
from selfspec_search.storage.shared_data import STUDY, SharedData
from selfspec_search.storage.trial import RECORD, Heartbeat, Running

SPACE = "space"
"""The key of the study's space among the shared data."""
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True, kw_only=True)
class StoredTrial:
    """A finished trial, its value (the predicted speedup; None if it was pruned) and what the study noted about it."""

    number: int
    draft_spec: DraftSpec
    value: float | None
    record: Mapping[str, Any]

    @classmethod
    def of(cls, trial: FrozenTrial, space: Space) -> StoredTrial:
        """From Optuna's own."""
        return cls(
            number=trial.number,
            draft_spec=space.from_params(trial.params),
            value=trial.value if trial.state == TrialState.COMPLETE else None,
            record=trial.user_attrs.get(RECORD, {}),
        )


class Store:
    """A worker's access to a study, as a context manager. `Store.open` opens it.

    Attributes:
        space: the draft specs that trials may have. `pipeline` replaces the default, which can only skip, before the
            first trial.
    """

    def __init__(self, ledger: Ledger, shared_data: SharedData, num_layers: int, name: str) -> None:
        self.name = name
        self.space = Space(num_layers=num_layers)
        self.ledger = ledger
        self._shared_data = shared_data
        self._known_numbers: set[int] = set()

    @classmethod
    def open(
        cls,
        storage: str | None,
        name: str | None,
        identity: Mapping[str, Any],
        *,
        num_layers: int,
        on_notice: Callable[[str], None] = lambda line: None,
        heartbeat: Heartbeat | None = None,
    ) -> Store:
        """Create a study, or join it; `InputError` if the storage cannot be used, or holds another study of this name.

        Args:
            storage: a path or URL, see `open_storage`; None for memory.
            name: the study's name; None for a name that follows from `identity` and `num_layers`.
            identity: settings that all workers must agree on, by readable names.
            num_layers: the model's number of layers.
            on_notice: receives one line for each long wait.
            heartbeat: how running trials show that their workers are alive.
        """
        about = json.loads(json.dumps({"identity": identity, "num_layers": num_layers}, sort_keys=True, default=str))
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        name = name or f"selfspec-{digest}"
        opened = open_storage(storage, on_notice=on_notice, heartbeat=heartbeat)
        try:
            ledger = Ledger(opened, name)
            return cls(ledger, SharedData(ledger, about), num_layers, name)
        except BaseException:
            opened.close()
            raise

    @property
    def created(self) -> bool:
        """Whether this worker is, or was, the study's creator: the first worker, or the first one still alive."""
        return self._shared_data.created

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with suppress(InputError) if error else nullcontext():  # the user must see the first error
            self.close()

    def close(self) -> None:
        """Leave the study: another worker makes the shared data if this worker has not."""
        try:
            self._shared_data.leave()
        finally:
            self.ledger.storage.close()

    def share(self, make: Callable[[], Mapping[str, bytes]]) -> dict[str, bytes]:
        """The shared data of all workers, by key: made by the study's creator, while the other workers wait.

        If the creator dies before all of the data is published, another worker becomes the creator.
        """
        return self._shared_data.share(make)

    def publish(self, key: str, data: bytes) -> None:
        """Store bytes with the study, for all workers and for later readers."""
        self.ledger.set_blob(key, data)

    def get(self, key: str) -> bytes | None:
        """The bytes published under `key`; None if there are none."""
        return blobs_of(self.ledger.attrs()).get(key)

    def begin(self, draft_spec: DraftSpec) -> Running:
        """Begin a trial, which the other workers see at once; use it as a context manager."""
        return self.ledger.start(draft_spec, self.space.to_params(draft_spec), self.space.distributions)

    def claim(self, draft_spec: DraftSpec) -> Running | None:
        """Begin a trial, unless another worker began one of this draft spec that this worker could not know of yet.

        Of workers that propose the same draft spec at the same moment, the one whose trial has the lowest number wins.
        """
        running = self.begin(draft_spec)
        params = self.space.to_params(draft_spec)
        for trial in self.ledger.trials()[: running.number]:
            unknown = trial.state in FINISHED and trial.number not in self._known_numbers
            if trial.params == params and (unknown or trial.state == TrialState.RUNNING):
                running.fail()
                return None
        return running

    def claimed(self) -> set[DraftSpec]:
        """The draft specs of all running trials, including those of this worker."""
        trials = [trial for trial in self.ledger.trials() if trial.state == TrialState.RUNNING]
        return {self.space.from_params(trial.params) for trial in trials if self._is_ours(trial)}

    def news(self) -> list[StoredTrial]:
        """Trials of all workers that were completed or pruned since the last call; at the first call, all of them.

        Trials whose workers died are failed, so that their draft specs may be tried again.
        """
        self.ledger.fail_stale()
        finished = [trial for trial in self.ledger.trials() if trial.state in FINISHED and self._is_ours(trial)]
        fresh = [StoredTrial.of(t, self.space) for t in finished if t.number not in self._known_numbers]
        self._known_numbers.update(trial.number for trial in fresh)
        return fresh

    def _is_ours(self, trial: FrozenTrial) -> bool:
        return set(trial.params) == set(self.space.choices)


@dataclass(frozen=True, kw_only=True)
class StoredStudy:
    """A study, as a storage holds it.

    Attributes:
        identity: settings that all workers agree on.
        trials: the finished trials, by number.
        blobs: shared and published data, by key.
    """

    name: str
    identity: Mapping[str, Any]
    space: Space
    trials: list[StoredTrial]
    blobs: Mapping[str, bytes] = field(repr=False)


def load_study(storage: str, name: str | None = None) -> StoredStudy:
    """Read the study of this name, or the only one of the storage; nothing is written.

    Raises:
        InputError: the storage cannot be read, or holds no such study; the message names those it holds.
    """
    opened = open_storage(storage, on_notice=lambda _: None, create=False)
    try:
        names = opened.do(lambda raw: [s.study_name for s in raw.get_all_studies() if STUDY in s.user_attrs])
        if not names:
            raise InputError(f"storage '{opened.label}' holds no study of a search; give another one")
        chosen = name or names[0]
        if chosen not in names or (name is None and len(names) > 1):
            wrong = f"has no study '{name}'" if name else "holds several studies"
            held = ", ".join(f"'{each}'" for each in names)
            raise InputError(f"storage '{opened.label}' {wrong}; choose one with --study: {held}")
        return opened.do(lambda raw: _read(raw, chosen))
    finally:
        opened.close()


def _read(raw: BaseStorage, name: str) -> StoredStudy:
    study_id = raw.get_study_id_from_name(name)
    attrs = raw.get_study_user_attrs(study_id)
    blobs, about = blobs_of(attrs), attrs[STUDY]
    space = Space.from_bytes(blobs[SPACE]) if SPACE in blobs else Space(num_layers=about["num_layers"])
    finished = raw.get_all_trials(study_id, deepcopy=False, states=FINISHED)
    trials = [StoredTrial.of(trial, space) for trial in finished if trial.params]
    return StoredStudy(name=name, identity=about["identity"], space=space, trials=trials, blobs=blobs)
