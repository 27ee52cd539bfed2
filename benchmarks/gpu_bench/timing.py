"""Timing: clocks are read when the device has nothing left to do; medians of repeats, after one untimed call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Any

import torch

from selfspec.errors import InputError
from selfspec.utils.statistics import wait_for

Call = Callable[[], Any]
Decode = Callable[[int], Any]
"""Decodes so many new tokens behind prompts of its own."""

CALLS = 8
"""In a row, so that reading the clock costs nothing beside them."""
WARM_UPS = 2
"""The first decoding compiles; what a CUDA graph captures is captured the second time that it is done."""
FEWEST = 2
"""New tokens of the short decoding that is subtracted: one more than the prefill's own, for peers that draft."""


def seconds_of(call: Call, device: torch.device) -> float:
    """Of one call, until the device is idle again."""
    wait_for(device)
    start = perf_counter()
    call()
    wait_for(device)
    return perf_counter() - start


def median_seconds(calls: Mapping[str, Call], device: torch.device, *, repeats: int) -> dict[str, float]:
    """Of each call: the median over `repeats` stretches of CALLS in a row, after one stretch that warms up.

    All take turns, so that what drifts (clocks, heat, neighbours) drifts for all.
    """

    def stretch(call: Call) -> None:
        for _ in range(CALLS):
            call()

    timed: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        stretch(call)
    for _ in range(repeats):
        for name, call in calls.items():
            timed[name].append(seconds_of(lambda call=call: stretch(call), device))
    return {name: median(seconds) / CALLS for name, seconds in timed.items()}


def decode_seconds(
    decoders: Mapping[str, Decode], device: torch.device, *, new_tokens: int, repeats: int
) -> dict[str, float]:
    """Seconds per new token of each decoder (in every row that it decodes), prefill and set-up taken off.

    Each decodes `new_tokens` and FEWEST tokens; the difference of the medians is what the tokens between them took. All
    take turns.

    Raises:
        InputError: the difference is lost in the noise.
    """
    lengths = (new_tokens, FEWEST)  # the longer first, so that caches have their size
    timed: dict[tuple[str, int], list[float]] = {(name, n): [] for name in decoders for n in lengths}
    for name, n in timed:
        for _ in range(WARM_UPS):
            decoders[name](n)
    for _ in range(repeats):
        for (name, n), seconds in timed.items():
            seconds.append(seconds_of(lambda name=name, n=n: decoders[name](n), device))
    between = {name: median(timed[name, new_tokens]) - median(timed[name, FEWEST]) for name in decoders}
    for name, seconds in between.items():
        if seconds <= 0:
            raise InputError(f"{name} took no longer for {new_tokens} tokens than for {FEWEST}; time more of them")
    return {name: seconds / (new_tokens - FEWEST) for name, seconds in between.items()}
