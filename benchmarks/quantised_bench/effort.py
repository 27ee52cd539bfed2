"""Effort: how much of everything is measured of a shape, at real sizes and as a toy."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from selfspec import InputError

LEAST = {"prompts": 1, "new_tokens": 2, "repeats": 1}
"""Of options that are given."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Sizes of one run.

    Args:
        prompts, prompt_length, new_tokens, repeats: of timed decodings; so many prompts tell the agreement, too.
        agreements: that are set, each a cell.
        lengths: tokens of the target's passes that are timed; a draft is at most one shorter than the longest.
        context: tokens cached before a timed pass.
        pass_repeats, passes_in_a_row: stretches of a pass, and how many passes make one; the median stretch counts.
        tolerance: how far the agreement may be off before the scale is set anew, `steps` times at most.
        trimmed: tokens of a trimmed head.
    """

    prompts: int
    prompt_length: int
    new_tokens: int
    repeats: int
    agreements: tuple[float, ...]
    lengths: tuple[int, ...]
    context: int
    pass_repeats: int
    passes_in_a_row: int
    tolerance: float
    steps: int
    trimmed: int


CPU = Effort(
    prompts=2,
    prompt_length=17,
    new_tokens=32,
    repeats=3,
    agreements=(0.9, 0.95),
    lengths=(1, 2, 3, 4, 5, 6, 7, 8, 9),
    context=128,
    pass_repeats=5,
    passes_in_a_row=2,
    tolerance=0.02,
    steps=6,
    trimmed=32_000,
)
GPU = Effort(
    prompts=4,
    prompt_length=128,
    new_tokens=130,
    repeats=3,
    agreements=(0.9, 0.95),
    lengths=(1, 3, 5, 7, 9),
    context=512,
    pass_repeats=9,
    passes_in_a_row=8,
    tolerance=0.015,
    steps=6,
    trimmed=32_000,
)
"""Fewer lengths: each is compiled."""
TOY = Effort(
    prompts=2,
    prompt_length=11,
    new_tokens=23,
    repeats=2,
    agreements=(0.9, 0.8),
    lengths=(1, 2, 3, 4, 5),
    context=37,
    pass_repeats=3,
    passes_in_a_row=3,
    tolerance=0.03,
    steps=5,
    trimmed=128,
)


def as_told(effort: Effort, options: argparse.Namespace) -> Effort:
    """With what the user said instead.

    Raises:
        InputError: it cannot be.
    """
    names = ("prompts", "new_tokens", "repeats")
    for name in names:
        at_least(name, getattr(options, name), LEAST[name])
    return replace(effort, **{name: value for name in names if (value := getattr(options, name)) is not None})


def at_least(name: str, value: int | None, least: int) -> None:
    """Raise `InputError` if an option was given and is less."""
    if value is not None and value < least:
        raise InputError(f"--{name.replace('_', '-')} is {value}, but it must be at least {least}")
