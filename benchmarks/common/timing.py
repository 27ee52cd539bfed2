"""Timing: seconds of calls that take turns, and seconds per token of decoders, without prefill."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch

from selfspec.errors import InputError
from selfspec.utils.statistics import Ratio, interleaved, medians, timed_task

Call = Callable[[], Any]
Decode = Callable[[int], Any]
"""Decodes the given number of new tokens after the decoder's own prompts."""
Key = TypeVar("Key", bound=Hashable)

WARM_UPS = 2
"""Decodings before timing: the first decoding compiles, the second captures CUDA graphs."""
FEWEST = 2
"""Tokens of the short decoding whose time is subtracted. The prefill writes the first token."""


@dataclass(frozen=True)
class Times:
    """Seconds of one call in each repeat."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def over(self, other: Times) -> Ratio:
        """The ratio of times, repeat by repeat: median, least and greatest."""
        ratios = [one / another for one, another in zip(self.seconds, other.seconds, strict=True)]
        return Ratio(value=median(ratios), low=min(ratios), high=max(ratios))


def take_turns(calls: Mapping[Key, Call], device: torch.device, *, repeats: int, in_a_row: int) -> dict[Key, Times]:
    """Time `repeats` stretches of `in_a_row` calls each, in turn, after one untimed stretch."""
    tasks = {key: timed_task(call, device, in_a_row=in_a_row) for key, call in calls.items()}
    return {key: Times(tuple(seconds)) for key, seconds in interleaved(tasks, repeats=repeats).items()}


def decode_seconds(
    decoders: Mapping[str, Decode], device: torch.device, *, new_tokens: int, repeats: int
) -> dict[str, float]:
    """Seconds per new token (of all rows together) of each decoder, without prefill and set-up.

    Each decoder decodes `new_tokens` and `FEWEST` tokens; the difference of the two median times counts.

    Raises:
        InputError: the difference is not positive, so noise dominates.
    """
    lengths = (new_tokens, FEWEST)  # the longer first, so that caches have their size
    tasks = {(name, n): timed_task(partial(decoders[name], n), device) for name in decoders for n in lengths}
    timed = medians(interleaved(tasks, repeats=repeats, warmup=WARM_UPS))
    between = {name: timed[name, new_tokens] - timed[name, FEWEST] for name in decoders}
    for name, seconds in between.items():
        if seconds <= 0:
            raise InputError(f"{name} took no longer for {new_tokens} tokens than for {FEWEST}; decode more tokens")
    return {name: seconds / (new_tokens - FEWEST) for name, seconds in between.items()}
