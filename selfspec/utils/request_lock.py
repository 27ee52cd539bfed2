"""RequestLock: one request at a time, and streams that may move to another thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from selfspec.errors import SelfspecError


class RequestLock:
    """Lets one request run at a time; requests of other threads wait.

    A second request of the owning thread would wait for itself, so it is refused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock in this context.

        Raises:
            SelfspecError: a stream of this thread holds the lock.
        """
        if self._owner == threading.get_ident():
            raise SelfspecError("a stream of this object is still open in this thread; exhaust or close it first")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def transfer(self) -> None:
        """Make the current thread the owner: another thread may go on with a stream."""
        self._owner = threading.get_ident()
