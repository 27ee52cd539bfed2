"""RequestLock: one request at a time, and streams that may move to another thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from selfspec.errors import SelfspecError

PATIENCE = 60.0
"""Seconds: how long a request waits while a stream that holds the lock is not read."""


class RequestLock:
    """Lets one request run at a time; requests of other threads wait.

    A second request of the owning thread would wait for itself, so it is refused. A request that is at work is waited
    for without limit. A stream that nobody reads is waited for `patience` seconds, counted again from each token read.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None  # not its ident, which a later thread may get
        self._unread_since: float | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock in this context.

        Raises:
            SelfspecError: a stream of this thread holds the lock, or a stream of another thread is not read.
        """
        if self._owner == threading.current_thread():
            raise SelfspecError("a stream of this object is still open in this thread; exhaust or close it first")
        self._acquire()
        try:
            self._owner = threading.current_thread()
            yield
        finally:
            self._owner = None
            self._lock.release()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """In this context a stream's reader has the token: another thread may go on with the stream."""
        self._unread_since = monotonic()
        try:
            yield
        finally:
            self._unread_since, self._owner = None, threading.current_thread()

    def _acquire(self) -> None:
        began = monotonic()
        while not self._lock.acquire(timeout=max(self._left(began), 0)):
            if self._left(began) <= 0:
                raise SelfspecError(
                    f"a stream of this object holds it, and nobody has read the stream for {self.patience:g} seconds; "
                    "exhaust or close the stream (stream.close()), or wrap the model once more for this thread"
                )

    def _left(self, began: float) -> float:
        """Seconds: how long to wait yet, as things stand."""
        since = self._unread_since
        return self.patience if since is None else max(since, began) + self.patience - monotonic()
