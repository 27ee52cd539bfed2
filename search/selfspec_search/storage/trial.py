"""Trial: a running trial of this worker, with heartbeats for the other workers, and the record of its owner."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import cached_property
from typing import Any, NamedTuple, Self

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import TrialState

from selfspec.errors import InputError
from selfspec.plan.draft_spec import DraftSpec
from selfspec_search.storage.errors import STORAGE_ERRORS
from selfspec_search.storage.retrying import RetryingStorage, defer_interrupt

HEARTBEAT_RETRY_SECONDS = 1.0
"""Seconds: pause before a failed heartbeat is retried. The grace period may soon be over."""
JOIN_SECONDS = 2.0
"""Seconds: an ended trial waits this long for its heartbeat thread, which may hang in a last heartbeat."""
RECORD = "record"
OWNER = "selfspec:owner"


class Heartbeat(NamedTuple):
    """How a running trial shows that its worker is alive."""

    interval: float = 10.0
    """Seconds: pause between two heartbeats of a trial."""
    grace: float = 30.0
    """Seconds: a trial is stale after this time without a heartbeat. It is longer than one lost connection."""


class Running:
    """A trial in state RUNNING, as a context manager: without `finish` or `prune` inside, the trial fails.

    A separate thread writes heartbeats, also while the main thread is inside torch.
    """

    def __init__(self, storage: RetryingStorage, trial_id: int, draft_spec: DraftSpec) -> None:
        self.draft_spec = draft_spec
        self._storage = storage
        self._trial_id = trial_id
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @cached_property
    def number(self) -> int:
        """The trial's number in its study."""
        return self._storage.do(lambda raw: raw.get_trial_number_from_id(self._trial_id))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with suppress(InputError) if error else nullcontext():  # the user must see the first error
            if not self._ended.is_set():
                self.fail()
        self._stop()

    def finish(self, value: float, record: Mapping[str, Any], constraints: Mapping[str, float] | None = None) -> None:
        """Complete the trial, with the objective and a record for JSON; constraints are feasible if at most 0."""
        self._end(TrialState.COMPLETE, value, record, constraints)

    def prune(self, estimate: float, record: Mapping[str, Any], constraints: Mapping[str, float] | None = None) -> None:
        """End the trial early; `estimate` is the objective as estimated after the first depth."""
        self._end(TrialState.PRUNED, estimate, record, constraints)

    def fail(self) -> None:
        """End the trial without a result; its draft spec may be tried again."""
        self._write(lambda raw: fail_trial(raw, self._trial_id))
        self._stop()

    def _end(
        self, state: TrialState, value: float, record: Mapping[str, Any], constraints: Mapping[str, float] | None
    ) -> None:
        def write(raw: BaseStorage) -> None:
            for name, constraint in (constraints or {}).items():
                raw.set_trial_system_attr(self._trial_id, f"constraints:{name}", constraint)
            raw.set_trial_user_attr(self._trial_id, RECORD, dict(record))
            if state == TrialState.PRUNED:
                raw.set_trial_intermediate_value(self._trial_id, 0, value)
            raw.set_trial_state_values(self._trial_id, state, None if state == TrialState.PRUNED else [value])

        self._write(write)
        self._stop()

    def _write(self, action: Callable[[BaseStorage], object]) -> None:
        """Run `action`, unless another worker failed this trial because its heartbeats had stopped."""
        if self._ended.is_set():
            return
        try:
            self._storage.do(action)
        except UpdateFinishedTrialError:
            # Without confirmation, after a lost connection or ctrl-C, this worker's own write may have ended it.
            if self._storage.do(lambda raw: raw.get_trial(self._trial_id)).state == TrialState.FAIL:
                self._storage.on_notice(
                    f"trial {self.number} was failed by another worker, because no heartbeat of this worker arrived; "
                    "its result is dropped"
                )
            self._stop()

    def _stop(self) -> None:
        with defer_interrupt():  # inside, a ctrl-C would leave the event locked
            self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)

    def _beat(self) -> None:
        raw = self._storage.raw
        if not isinstance(raw, BaseHeartbeat):  # memory has one worker
            return
        pause = interval = float(raw.get_heartbeat_interval() or 0)
        while not self._ended.wait(pause):
            try:
                raw.record_heartbeat(self._trial_id)  # without retries: the main thread waits for a lost connection
                pause = interval
            except (UpdateFinishedTrialError, KeyError):
                return  # the main thread finds out when it writes
            except STORAGE_ERRORS:
                pause = min(interval, HEARTBEAT_RETRY_SECONDS)


def fail_trial(raw: BaseStorage, trial_id: int) -> None:
    """Fail a trial, unless it ended, or another worker failed it, in the meantime."""
    with suppress(UpdateFinishedTrialError):
        raw.set_trial_state_values(trial_id, TrialState.FAIL)


def owner() -> dict[str, Any]:
    """The worker that begins a trial."""
    return {"machine": machine(), "pid": os.getpid()}


def machine() -> str:
    """The name of the machine, and of the container in which process numbers hold."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def is_gone(worker: Mapping[str, Any]) -> bool:
    """Whether a trial's owner ran on this machine and its process has ended. This needs no wait for heartbeats."""
    if worker.get("machine") != machine():
        return False
    with suppress(PermissionError):  # another user's process
        try:
            os.kill(worker["pid"], 0)
        except ProcessLookupError:
            return True
    return False
