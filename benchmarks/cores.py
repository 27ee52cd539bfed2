"""Cores: what is compared runs on one and the same, so that no side has more of the machine than the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def one_core() -> Iterator[int]:
    """Keep this process to one core; yields how many it has then: all of them, where a system knows no such thing."""
    if not hasattr(os, "sched_setaffinity"):
        yield usable()
        return
    before = os.sched_getaffinity(0)
    _keep_to({max(before)})
    try:
        yield usable()
    finally:
        _keep_to(before)


def usable() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _keep_to(cores: set[int]) -> None:
    # Every thread has its own affinity, and NumPy's were started when it was imported.
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)
