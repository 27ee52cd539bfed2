"""Machine: the device of a run, pinning to one core, and a text cache that starts empty."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from selfspec_search.replay.text_cache import CACHE_VARIABLE

from selfspec import InputError


def device_of(name: str | None, *, toy: bool) -> torch.device:
    """The device of this name; by default CUDA, or the CPU for `--toy`.

    Raises:
        InputError: this machine has no device of this name.
    """
    try:
        device = torch.device(name or ("cpu" if toy else "cuda"))
    except RuntimeError:
        raise InputError(f"device '{name}' is unknown; give 'cuda' or 'cpu'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here; try the code with --toy, or give --device cpu and hours")
    return device


@contextmanager
def one_core() -> Iterator[int]:
    """Pin this process to one core, so that both sides of a comparison use one core.

    Yields the number of usable cores: 1, or all cores on a system that cannot pin a process.
    """
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
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _keep_to(cores: set[int]) -> None:
    # Every thread has its own affinity, and NumPy's threads were started when it was imported.
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


@contextmanager
def no_cached_texts() -> Iterator[None]:
    """In this context, a search finds no cached texts and writes its own."""
    before = os.environ.get(CACHE_VARIABLE)
    with TemporaryDirectory() as empty:
        os.environ[CACHE_VARIABLE] = empty
        try:
            yield
        finally:
            del os.environ[CACHE_VARIABLE]
            if before is not None:
                os.environ[CACHE_VARIABLE] = before
