"""Turns: one request at a time, whichever threads ask."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from selfspec.errors import SelfspecError


class Turns:
    """Threads wait for each other; a second request from the same thread would wait for itself, so it is refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """In this context nobody else has a turn."""
        if self._owner == threading.get_ident():
            raise SelfspecError("a stream of this object is still open in this thread; exhaust or close it first")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def pass_on(self) -> None:
        """The turn is this thread's from now on: a stream may change hands."""
        self._owner = threading.get_ident()
