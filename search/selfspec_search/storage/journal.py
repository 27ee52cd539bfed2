"""Journal: Optuna's storage in a file on a shared file system, with heartbeats, and safe from killed workers."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from selfspec_search.storage.trial import Heartbeat

HEARTBEAT = "selfspec:beat"
"""The attribute of a trial in a journal that changes with each heartbeat."""
JOURNAL_LOCK_SECONDS = 8
"""Seconds: a journal's lock is taken from its holder, which was killed, after this time.

Nobody can write a heartbeat until then: it must be well below the grace period."""


class Journal(JournalStorage, BaseHeartbeat):
    """Optuna's journal with the heartbeat that Optuna has for databases only.

    Clocks of two machines are not compared: a trial is stale if this process saw no new heartbeat for the grace period.
    """

    def __init__(self, path: Path, heartbeat: Heartbeat) -> None:
        super().__init__(JournalFileBackend(str(path), lock_obj=_JournalLock(path)))
        self._heartbeat = heartbeat
        self._seen: dict[int, tuple[float | None, float]] = {}

    def record_heartbeat(self, trial_id: int) -> None:
        self.set_trial_system_attr(trial_id, HEARTBEAT, time.time())

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        now, stale = time.monotonic(), []
        for trial in self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,)):
            beat = trial.system_attrs.get(HEARTBEAT)
            last, since = self._seen.get(trial._trial_id, (beat, now))
            self._seen[trial._trial_id] = (beat, since if beat == last else now)
            if beat == last and now - since > self._heartbeat.grace:
                stale.append(trial._trial_id)
        return stale

    def get_heartbeat_interval(self) -> int | None:
        return self._heartbeat.interval  # type: ignore[return-value]

    def get_heartbeat_stale_trial_callback(self) -> None:
        return None


class _JournalLock(JournalFileOpenLock):
    """Optuna's lock. Its next holder deletes the half line that a killed worker left: Optuna cannot read past it."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), grace_period=JOURNAL_LOCK_SECONDS)
        self._journal = path

    def acquire(self) -> bool:
        locked = super().acquire()
        with self._journal.open("rb+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            if file.read(1) not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return locked

    def release(self) -> None:
        with contextlib.suppress(RuntimeError):  # another worker took the lock, after this one had written
            super().release()
