"""Interleaved timing, and speed ratios with intervals: the one harness of the benchmark, the search and the scripts.

`interleaved` runs all tasks once per repeat, one right after the other, so that drift (clocks, heat, other processes)
affects all tasks equally. A task returns its own seconds: `timed_task` turns any call into a task.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch

RESAMPLES = 2000
"""Resamples: of the bootstrap."""
RARE_EVERY = 5
"""Repeats: from one run of a rare task to the next."""
MOST_REPEATS = 4
"""Factor: a budget extends the repeats to at most this many times `repeats`."""

Array = np.ndarray[Any, Any]
Key = TypeVar("Key", bound=Hashable)
Task = Callable[[], float]
"""Runs the work and returns its duration in seconds."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of speeds, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x ({self.low:.2f}-{self.high:.2f})"

    def to_dict(self) -> dict[str, float]:
        return {"value": round(self.value, 4), "low": round(self.low, 4), "high": round(self.high, 4)}


def interleaved(
    tasks: Mapping[Key, Task],
    *,
    repeats: int,
    warmup: int = 1,
    budget: float = 0.0,
    group: int | None = None,
    rare: Callable[[Key], bool] = lambda key: False,
    on_repeat: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Key, list[float]]:
    """Run all tasks in turn. Returns the seconds of every run of each task, in the order of the runs.

    Args:
        repeats: runs of each task.
        warmup: uncounted runs of each task before the first repeat.
        budget: Seconds: more repeats begin within this time from the first repeat, up to MOST_REPEATS * `repeats`.
        group: the number of consecutive tasks that are compared; by default all. The order within a group rotates with
            the repeat and the group, so that no task always comes first.
        rare: whether the task with this key runs only in every RARE_EVERY-th repeat, starting with the first repeat.
        on_repeat: called with (repeats done, `repeats`), first before the warm-up.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in tasks}
    on_repeat(0, repeats)
    for task in tasks.values():
        for _ in range(warmup):
            task()
    repeat, end = 0, perf_counter() + budget
    while repeat < repeats or (repeat < MOST_REPEATS * repeats and perf_counter() < end):
        for key in _in_turn(list(tasks), group or max(1, len(tasks)), repeat):
            if repeat % RARE_EVERY == 0 or not rare(key):
                seconds[key].append(tasks[key]())
        repeat += 1
        on_repeat(min(repeat, repeats), repeats)
    return seconds


def timed_task(call: Callable[[], Any], device: torch.device, *, in_a_row: int = 1) -> Task:
    """A task that makes a call `in_a_row` times and returns the seconds per call.

    The task waits for the device before reading the clock. With many calls in a row the waiting costs nothing.
    """

    def task() -> float:
        wait_for(device)
        start = perf_counter()
        for _ in range(in_a_row):
            call()
        wait_for(device)
        return (perf_counter() - start) / in_a_row

    return task


def median_seconds(
    calls: Mapping[Key, Callable[[], Any]],
    device: torch.device,
    *,
    repeats: int,
    in_a_row: int = 1,
    warmup: int = 1,
    budget: float = 0.0,
    rare: Callable[[Key], bool] = lambda key: False,
    on_repeat: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Key, float]:
    """The median seconds of each call, timed in turn after `warmup` runs."""
    tasks = {key: timed_task(call, device, in_a_row=in_a_row) for key, call in calls.items()}
    return medians(interleaved(tasks, repeats=repeats, warmup=warmup, budget=budget, rare=rare, on_repeat=on_repeat))


def medians(seconds: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    """The median seconds of each task."""
    return {key: median(runs) for key, runs in seconds.items()}


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speed_ratio(seconds: Array, tokens: Array, *, seed: int = 0) -> Ratio:
    """The speed of the first decoder divided by the speed of the second decoder.

    The 95 % interval comes from a bootstrap over the prompts and over each prompt's repeats. Both decoders get the same
    resamples (paired), so the runs must be interleaved.

    Args:
        seconds: `2 repeats prompts`.
        tokens: `2 prompts`, or `2 repeats prompts` if the repeats differ, as samples do.
    """
    _, repeats, prompts = seconds.shape
    random = np.random.default_rng(seed)
    columns = random.integers(prompts, size=(RESAMPLES, 1, prompts))
    rows = random.integers(repeats, size=(RESAMPLES, repeats, prompts))
    of_tokens = (rows, columns) if tokens.ndim == 3 else (columns[:, 0],)
    one, other = (speed(seconds[i][rows, columns], tokens[i][of_tokens]) for i in (0, 1))
    low, high = np.quantile(one / other, [0.025, 0.975])
    value = speed(seconds[0], tokens[0]) / speed(seconds[1], tokens[1])
    return Ratio(value=float(value), low=float(low), high=float(high))


def speed(seconds: Array, tokens: Array) -> Any:
    """Tokens per second.

    From `seconds` `... repeats prompts` and `tokens` `... prompts`: by each prompt's median repeat. If `tokens` also
    has repeats: over all repeats together.
    """
    if tokens.ndim == seconds.ndim:
        return tokens.sum(axis=(-2, -1)) / seconds.sum(axis=(-2, -1))
    return tokens.sum(axis=-1) / np.median(seconds, axis=-2).sum(axis=-1)


def _in_turn(keys: Sequence[Key], group: int, repeat: int) -> list[Key]:
    """All keys, with each group of `group` keys rotated by the repeat and the index of the group."""
    order: list[Key] = []
    for first in range(0, len(keys), group):
        members = keys[first : first + group]
        shift = (repeat + first // group) % len(members)
        order += [*members[shift:], *members[:shift]]
    return order
