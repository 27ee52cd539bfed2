"""Store: the record of a search that its workers share: who tries what, what was found, what all must have alike.

It is not the sampler's study: asking Optuna through a database reads and writes once per sub-layer, which takes longer
than a trial. Here a trial is written when it begins and when it ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from types import TracebackType
from typing import Any, Self

from optuna.trial import FrozenTrial, TrialState

from selfspec.errors import InputError
from selfspec.plan.draft_spec import Recipe
from selfspec_search.ledger import Ledger
from selfspec_search.running import GRACE_SECONDS, HEARTBEAT_SECONDS, Running
from selfspec_search.sharing import SHARE_SECONDS, Sharing
from selfspec_search.space import Space
from selfspec_search.storage_url import open_storage
from selfspec_search.stored import FINISHED, StoredStudy, StoredTrial, load_study, study_names

__all__ = ["Running", "Store", "StoredStudy", "StoredTrial", "load_study", "study_names"]

MOST_RETRIES = 3
"""A recipe whose workers died more often than this may be what killed them."""


class Store:
    """A worker's access to a study, as a context manager. `Store.open` opens it."""

    def __init__(self, ledger: Ledger, sharing: Sharing, num_layers: int, name: str) -> None:
        self.name = name
        self._ledger = ledger
        self._sharing = sharing
        self.space = Space(num_layers=num_layers)
        """What the trials choose from; set anew before the first trial where there is more to choose."""
        self._told: set[int] = set()
        self._retries: dict[Recipe, dict[str, Any]] = {}

    @classmethod
    def open(
        cls,
        storage: str | None,
        name: str | None,
        identity: Mapping[str, Any],
        *,
        num_layers: int,
        on_notice: Callable[[str], None] = lambda line: None,
        heartbeat: float = HEARTBEAT_SECONDS,
        grace: float = GRACE_SECONDS,
    ) -> Store:
        """Make a study, or join it.

        Args:
            storage: None for memory, a path for an SQLite file, a path ending in '.journal' or 'journal://PATH' for a
                journal on a shared file system, or a URL such as 'postgresql://USER:PASSWORD@HOST/DATABASE'.
            name: of the study; None for one made of what the study is about.
            identity: all that workers must agree on for their trials to be compared, by readable names.
            num_layers: of the model.
            on_notice: told in one line of each wait for a lost connection.
            heartbeat: seconds between signs of life.
            grace: seconds of silence after which a worker is taken for dead.

        Raises:
            InputError: the storage cannot be used, or holds another study of this name.
        """
        about = json.loads(json.dumps({"identity": identity, "num_layers": num_layers}, sort_keys=True, default=str))
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        name = name or f"selfspec-{digest}"
        opened = open_storage(storage, on_notice=on_notice)
        try:
            ledger = Ledger(opened, name, heartbeat=heartbeat, grace=grace)
            return cls(ledger, Sharing(ledger, about), num_layers, name)
        except BaseException:
            opened.close()
            raise

    @property
    def created(self) -> bool:
        """Whether this worker makes, or made, what is shared: it came first, or those before it died."""
        return self._sharing.created

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(InputError) if error else nullcontext():  # what went wrong first is what the user must see
            self.close()

    def close(self) -> None:
        """Leave the study: another worker makes what this one did not get done."""
        try:
            self._sharing.leave()
        finally:
            self._ledger.storage.close()

    def share(self, make: Callable[[], Mapping[str, bytes]], seconds: float = SHARE_SECONDS) -> dict[str, bytes]:
        """What all workers of a study must have alike: made by one of them, waited for by the others.

        If the maker dies before it has published everything, another worker makes it.

        Args:
            make: what to publish, by key; called if it falls to this worker.
            seconds: how long to wait for another worker.

        Raises:
            InputError: the maker lives but has not published in time.
        """
        return self._sharing.share(make, seconds)

    def publish(self, key: str, data: bytes) -> None:
        """Keep bytes with the study, for all its workers and for later readers."""
        self._sharing.publish(key, data)

    def get(self, key: str) -> bytes | None:
        """What was published under `key`; None if nothing was, or not yet all of it."""
        return self._sharing.get(key)

    def begin(self, recipe: Recipe) -> Running:
        """Begin a trial, which the other workers see at once; use it as a context manager."""
        params, history = self.space.to_params(recipe), self._retries.pop(recipe, {})
        return self._ledger.start(recipe, params, self.space.distributions, history=history)

    def claim(self, recipe: Recipe) -> Running | None:
        """Begin a trial, unless another worker has begun one of this recipe, which this one could not know of yet.

        Workers that look for something new at the same moment find the same: the first to begin it has it.
        """
        running = self.begin(recipe)
        params, earlier = self.space.to_params(recipe), self._ledger.trials()[: running.number]
        if any(self._is_unknown(trial) and trial.params == params for trial in earlier):
            running.fail()
            return None
        return running

    def waiting(self) -> Recipe | None:
        """The recipe of a trial whose worker died, for this worker to begin anew: one worker gets it, once."""
        trials = self._ledger.trials()
        for trial in trials:
            if self._is_ours(trial) and trial.state == TrialState.RUNNING and self._ledger.ends_for_dead(trial):
                history = _history(trial)
                if len(history["retry_history"]) <= MOST_RETRIES and not _is_elsewhere(trial, trials):
                    recipe = self.space.from_params(trial.params)
                    self._retries[recipe] = history
                    return recipe
        return None

    def claimed(self) -> set[Recipe]:
        """What all workers are trying now, this one included."""
        running = [
            trial for trial in self._ledger.trials() if trial.state == TrialState.RUNNING and self._is_ours(trial)
        ]
        return {self.space.from_params(trial.params) for trial in running}

    def news(self) -> list[StoredTrial]:
        """Trials of all workers that ended, complete or pruned, since the last call; at the first call all of them."""
        fresh = [
            t for t in self._ledger.trials() if t.state in FINISHED and t.number not in self._told and self._is_ours(t)
        ]
        news = [StoredTrial.of(trial, self.space) for trial in fresh]
        self._told.update(trial.number for trial in news)
        return news

    def _is_unknown(self, trial: FrozenTrial) -> bool:
        """Whether a trial runs, or ended after the last call of `news`."""
        return trial.state == TrialState.RUNNING or (trial.state in FINISHED and trial.number not in self._told)

    def _is_ours(self, trial: FrozenTrial) -> bool:
        return set(trial.params) == set(self.space.choices)


def _is_elsewhere(dead: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    """Whether another trial has, or had, the same recipe: the worker died before it could leave it to the other."""
    others = [trial for trial in trials if trial.number != dead.number and trial.params == dead.params]
    return any(trial.state in (TrialState.RUNNING, *FINISHED) for trial in others)


def _history(trial: FrozenTrial) -> dict[str, Any]:
    """What Optuna keeps of a retried trial: the first one's number, and those of all."""
    earlier = trial.system_attrs.get("retry_history", [])
    return {
        "failed_trial": trial.system_attrs.get("failed_trial", trial.number),
        "retry_history": [*earlier, trial.number],
    }
