"""Running: a trial that this worker works on; its heartbeats tell the others that the worker is alive."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from operator import methodcaller
from types import TracebackType
from typing import Any, Self

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from selfspec.errors import InputError
from selfspec.plan.draft_spec import Recipe
from selfspec_search.interrupts import hold_back
from selfspec_search.storage import STALL_SECONDS, STORAGE_ERRORS, Storage, reason_of

HEARTBEAT_SECONDS = 10.0
"""Between two heartbeats: one small write each, which no database minds."""
GRACE_SECONDS = 30.0
"""A worker silent for so long is taken for dead: one lost connection must not look like it."""
AGAIN_SECONDS = 1.0
"""After a heartbeat that failed: others may not be far from giving this worker up."""
JOIN_SECONDS = 2.0
"""So long an ended trial waits for its thread, which may hang in a last heartbeat until the system gives up."""
RECORD = "record"
OWNER, BEAT = "selfspec:owner", "selfspec:beat"


class Running:
    """A trial in state RUNNING, as a context manager: left without `finish` or `prune`, the trial has failed.

    Heartbeats come from a thread of their own, so also while the main thread is inside torch.

    Args:
        storage: where the trial is.
        trial_id: Optuna's.
        recipe: what is tried.
        interval: seconds between heartbeats.
    """

    def __init__(self, storage: Storage, trial_id: int, recipe: Recipe, interval: float) -> None:
        self.recipe = recipe
        self._storage = storage
        self._trial_id = trial_id
        self._interval = interval
        self._ending: set[TrialState] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @cached_property
    def number(self) -> int:
        """Of the trial in its study."""
        return self._storage.do(lambda storage: storage.get_trial_number_from_id(self._trial_id))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(InputError) if error else nullcontext():  # what went wrong first is what the user must see
            if not self._ended.is_set():
                self.fail()
        self._stop()

    def finish(self, value: float, record: Mapping[str, Any], constraints: Mapping[str, float] | None = None) -> None:
        """Complete the trial.

        Args:
            value: the objective.
            record: what to keep of it; anything that JSON can hold.
            constraints: values that are feasible if at most 0, as Optuna keeps them.
        """
        self._note(record, constraints)
        self._end(TrialState.COMPLETE, [value])

    def prune(self, estimate: float, record: Mapping[str, Any], constraints: Mapping[str, float] | None = None) -> None:
        """End the trial early: `estimate` is what the first depth promised."""
        self._note(record, constraints)
        self._write(lambda storage: storage.set_trial_intermediate_value(self._trial_id, 0, estimate))
        self._end(TrialState.PRUNED)

    def fail(self) -> None:
        """End the trial without a result; its recipe may be tried again."""
        self._end(TrialState.FAIL)

    def _note(self, record: Mapping[str, Any], constraints: Mapping[str, float] | None) -> None:
        for name, value in (constraints or {}).items():
            self._write(methodcaller("set_trial_system_attr", self._trial_id, f"constraints:{name}", value))
        self._write(lambda storage: storage.set_trial_user_attr(self._trial_id, RECORD, dict(record)))

    def _end(self, state: TrialState, values: Sequence[float] | None = None) -> None:
        self._ending.add(state)
        self._write(lambda storage: storage.set_trial_state_values(self._trial_id, state, values))
        self._stop()

    def _write(self, action: Callable[[BaseStorage], object]) -> None:
        """Run `action`, unless another worker ended this trial because this one had been silent for too long."""
        if self._ended.is_set():
            return
        try:
            self._storage.do(action)
        except UpdateFinishedTrialError:
            # A lost connection, or a ctrl-C, between a write and what follows it: what comes next finds its work.
            if self._storage.do(lambda storage: storage.get_trial(self._trial_id)).state not in self._ending:
                self._storage.on_notice(
                    f"trial {self.number} was taken over by another worker, because this one had been silent; its "
                    "result here is dropped"
                )
            self._stop()

    def _stop(self) -> None:
        with hold_back():  # within, a ctrl-C would leave the event locked
            self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)

    def _beat(self) -> None:
        count, told, pause = 0, False, self._interval
        due = time.monotonic() + pause
        while not self._ended.wait(pause):
            count += 1
            try:
                # Once: the main thread is the one that waits for a storage, and tells of it at once.
                self._storage.raw.set_trial_system_attr(self._trial_id, BEAT, count)
                problem = None
            except (UpdateFinishedTrialError, KeyError):
                return  # the main thread finds out when it writes
            except STORAGE_ERRORS as error:
                problem = reason_of(error)
            late = time.monotonic() - due
            self._storage.outages += late > STALL_SECONDS
            if problem is None:
                told, pause = False, self._interval
                due = time.monotonic() + pause
                continue
            pause = min(self._interval, AGAIN_SECONDS)
            if late > self._interval and not told:
                self._storage.on_notice(f"no heartbeat reaches storage '{self._storage.label}': {problem}; trying on")
                told = True


def owner() -> dict[str, Any]:
    """Who works on a trial that this process begins; the token tells its trials apart."""
    return {"machine": machine(), "pid": os.getpid(), "token": uuid.uuid4().hex}


def machine() -> str:
    """A name of the machine, and of the container where process numbers have a meaning."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def trial_with_token(storage: BaseStorage, study_id: int, token: str) -> FrozenTrial | None:
    """The trial that was begun with this token."""
    trials = storage.get_all_trials(study_id, deepcopy=False)
    return next((trial for trial in reversed(trials) if trial.system_attrs.get(OWNER, {}).get("token") == token), None)
