"""Interrupts: a ctrl-C that waits for what must not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def hold_back() -> Iterator[None]:
    """Let a ctrl-C strike at the end of the block; a second one strikes at once.

    `KeyboardInterrupt` may be raised between any two instructions. In the midst of a transaction it would leave the
    connection with its lock, for as long as the traceback lives: everybody would wait for it, this process included.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield  # it strikes elsewhere, or not at all
        return
    struck: list[FrameType | None] = []

    def note(number: int, frame: FrameType | None) -> None:
        if struck:
            usual(number, frame)
        struck.append(frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if struck:
            usual(signal.SIGINT, struck[0])
