"""Watch: tells which running trials have lost their worker."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

from selfspec_search.running import BEAT, OWNER, machine
from selfspec_search.storage import Storage


class Watch:
    """Tells which running trials have lost their worker.

    No clock is compared between machines: a worker is dead if its process is gone from this machine, or if it was
    watched for the whole grace period without a new heartbeat.
    """

    def __init__(self, storage: Storage, grace: float) -> None:
        self._storage = storage
        self._grace = grace
        self._seen: dict[int, tuple[int, float]] = {}
        self._outages = storage.outages

    def is_dead(self, trial: FrozenTrial, now: float) -> bool:
        """Whether nobody works on a trial in state RUNNING; `now` is in seconds, of any steady clock."""
        if self._outages != self._storage.outages:  # while nobody could write, silence meant nothing
            self._outages = self._storage.outages
            self._seen.clear()
        beat = trial.system_attrs.get(BEAT, 0)
        last, since = self._seen.get(trial.number, (None, now))
        if beat != last:
            since = now
        self._seen[trial.number] = (beat, since)
        return now - since > self._grace or is_gone(trial.system_attrs.get(OWNER, {}))


def is_gone(worker: Mapping[str, Any]) -> bool:
    """Whether a worker ran on this machine and its process is no more."""
    if worker.get("machine") != machine():
        return False
    try:
        os.kill(worker["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
