"""Timing in turn, and ratios of speeds with their intervals: the one harness of the benchmark, the search and scripts.

`interleaved` runs all tasks once per repeat, one right after the other, so that drift (clocks, heat, neighbours) falls
on all tasks alike. A task returns its own seconds: `timed_task` makes one of any call.
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
"""Resamples of the bootstrap."""
RARE_EVERY = 5
"""Repeats from one run of a rare task to the next."""
MOST_REPEATS = 4
"""Times `repeats` that a budget can add up to."""

Array = np.ndarray[Any, Any]
Key = TypeVar("Key", bound=Hashable)
Task = Callable[[], float]
"""Does its work and returns the seconds that the work took."""


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
    """Seconds of every run of every task, in the order of the runs; all tasks take turns.

    Args:
        repeats: runs of each task.
        warmup: runs of each task before, which do not count; all of one task's in a row.
        budget: seconds from the first repeat in which more repeats may begin, up to MOST_REPEATS times `repeats`.
        group: consecutive tasks that compete. The order within a group rotates from repeat to repeat and from group to
            group, so that no task always comes first. All tasks are one group by default.
        rare: whether a task, by its key, runs in every RARE_EVERY-th repeat only, from the first one on.
        on_repeat: called with (repeats done, `repeats`), for the first time before the warm-up.
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

    The clock is read when the device is idle. Many quick calls in a row make reading it cost nothing.
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
    budget: float = 0.0,
    rare: Callable[[Key], bool] = lambda key: False,
    on_repeat: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Key, float]:
    """The median seconds of each call: `timed_task`s that are `interleaved`, after one run that warms up."""
    tasks = {key: timed_task(call, device, in_a_row=in_a_row) for key, call in calls.items()}
    return medians(interleaved(tasks, repeats=repeats, budget=budget, rare=rare, on_repeat=on_repeat))


def medians(seconds: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    """The median seconds of each task."""
    return {key: median(runs) for key, runs in seconds.items()}


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speed_ratio(seconds: Array, tokens: Array, *, seed: int = 0) -> Ratio:
    """The speed of the first decoder over that of the second.

    The 95 % interval comes from a bootstrap over the prompts, and over the repeats of each, drawn for both decoders
    alike (paired): the decodings must have been interleaved.

    Args:
        seconds: `2 repeats prompts`.
        tokens: `2 prompts`; or `2 repeats prompts` where repeats differ in what they write, as samples do.
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
    """Tokens per second, of the median repeat of each prompt (`... repeats prompts` and `... prompts`), or of all
    samples (both `... repeats prompts`)."""
    if tokens.ndim == seconds.ndim:
        return tokens.sum(axis=(-2, -1)) / seconds.sum(axis=(-2, -1))
    return tokens.sum(axis=-1) / np.median(seconds, axis=-2).sum(axis=-1)


def _in_turn(keys: Sequence[Key], group: int, repeat: int) -> list[Key]:
    """All keys, each group of `group` keys rotated by the repeat and by the group's place."""
    order: list[Key] = []
    for first in range(0, len(keys), group):
        members = keys[first : first + group]
        shift = (repeat + first // group) % len(members)
        order += [*members[shift:], *members[:shift]]
    return order
