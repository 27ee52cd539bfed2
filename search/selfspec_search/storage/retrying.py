"""Retrying: an Optuna storage whose calls are retried after locks and lost connections, and fail in one line."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from types import FrameType
from typing import TypeVar

from optuna.storages import BaseStorage
from sqlalchemy import Engine

from selfspec.errors import InputError
from selfspec_search.storage.errors import STORAGE_ERRORS, describe, is_locked, is_transient

T = TypeVar("T")

RETRY_SECONDS = 90.0
"""Seconds: a call is retried for this long. A server restarts, or ends a dead worker's transaction, in less."""
PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)
"""Seconds: pauses between retries after a lost connection; the last one repeats."""
LOCK_PAUSE_SECONDS = 0.1
"""Seconds: pause between retries for a lock. Each try has itself waited for the lock."""
LOCK_NOTICE_SECONDS = 5.0
"""Seconds: a lock is reported after this time. Slow workers normally delay each other for less."""


class RetryingStorage:
    """An Optuna storage, its label for messages, and `on_notice`, which receives one line for each long wait."""

    def __init__(self, raw: BaseStorage, label: str, on_notice: Callable[[str], None]) -> None:
        self.raw = raw
        self.label = label
        self.on_notice = on_notice
        self._has_failed = False

    @property
    def engine(self) -> Engine | None:
        """SQLAlchemy's engine; None for memory and journals."""
        engine: Engine | None = getattr(getattr(self.raw, "_backend", self.raw), "engine", None)
        return engine

    def do(self, action: Callable[[BaseStorage], T]) -> T:
        """Run `action` on the storage; `InputError` if it fails permanently or for longer than `RETRY_SECONDS`."""
        seconds = 0.0 if self._has_failed else RETRY_SECONDS
        try:
            return retry(lambda: action(self.raw), self.label, self.on_notice, seconds)
        except KeyError as error:
            raise InputError(f"storage '{self.label}' no longer holds the study; choose another --study") from error
        except STORAGE_ERRORS as error:
            self._has_failed = True  # each of the last writes before the exit is tried only once
            raise InputError(
                f"{describe(self.label, error)}; finished trials are kept: give the same command again to go on"
            ) from error

    def close(self) -> None:
        """Close the connections of this process."""
        if self.engine is not None:
            self.engine.dispose()


def retry(call: Callable[[], T], label: str, on_notice: Callable[[str], None], seconds: float | None = None) -> T:
    """Return the result of `call`, tried again after a lock or a lost connection; ctrl-C takes effect between tries.

    Args:
        call: reads or writes a storage.
        label: the storage's name in messages.
        on_notice: receives at most one line.
        seconds: time after which an error is raised; None for `RETRY_SECONDS`.
    """
    seconds = RETRY_SECONDS if seconds is None else seconds
    began, pauses, reported = time.monotonic(), chain(PAUSES_SECONDS, repeat(PAUSES_SECONDS[-1])), False
    while True:
        try:
            with defer_interrupt():
                return call()
        except STORAGE_ERRORS as error:
            waited, locked = time.monotonic() - began, is_locked(error)
            if not is_transient(error) or waited >= seconds:
                raise
            if not reported and (waited >= LOCK_NOTICE_SECONDS or not locked):
                on_notice(f"{describe(label, error)}; trying again for {seconds:g} s")
                reported = True
        time.sleep(LOCK_PAUSE_SECONDS if locked else next(pauses))


@contextmanager
def defer_interrupt() -> Iterator[None]:
    """Delay a ctrl-C, or a SIGTERM with a handler, until the end of the block; a second one takes effect at once.

    `KeyboardInterrupt` may be raised between any two instructions. Inside a transaction it would leave
    a lock until the traceback is freed.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    usual = {int(number): handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        usual = {}  # signals reach another thread
    deferred: list[tuple[int, FrameType | None]] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if deferred:
            usual[number](number, frame)
        deferred.append((number, frame))

    for number in usual:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        if deferred:
            usual[deferred[0][0]](*deferred[0])
