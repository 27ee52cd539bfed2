"""Space: skip sets as yes-or-no choices, one per sub-layer; where the search starts, and what lies beside a set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import optuna

from selfspec.skip_set import SkipSet

Sublayer = tuple[str, int]
MOST_EARLY_EXITS = 16
"""Deep models: not every exit layer is tried, but so many, evenly spread."""


def sublayers(num_layers: int) -> list[Sublayer]:
    """All 2L of them, in the order in which the model runs them."""
    return [(kind, layer) for layer in range(num_layers) for kind in ("attn", "mlp")]


def skip_set_of(skipped: Sequence[Sublayer] | set[Sublayer]) -> SkipSet:
    return SkipSet(**{kind: [layer for k, layer in skipped if k == kind] for kind in ("attn", "mlp")})


def to_params(skip_set: SkipSet, num_layers: int) -> dict[str, bool]:
    """A skip set as an Optuna trial's parameters: True where a sub-layer is skipped."""
    skipped = set(skip_set)
    return {sublayer_name(sublayer): sublayer in skipped for sublayer in sublayers(num_layers)}


def from_params(params: Mapping[str, Any], num_layers: int) -> SkipSet:
    """The inverse of `to_params`."""
    return skip_set_of([sublayer for sublayer in sublayers(num_layers) if params[sublayer_name(sublayer)]])


def suggest(trial: optuna.Trial, num_layers: int) -> SkipSet:
    """Let an Optuna trial choose."""
    return skip_set_of(
        [
            sublayer
            for sublayer in sublayers(num_layers)
            if trial.suggest_categorical(sublayer_name(sublayer), [False, True])
        ]
    )


def seeds(num_layers: int) -> Iterator[SkipSet]:
    """Sets that are known to be good for some model: strided, middle blocks, attention only, early exits, none."""
    layers = range(num_layers)
    yield SkipSet(attn=layers[1::2], mlp=layers[1::2])
    yield SkipSet(attn=layers[1:-1:3], mlp=layers[1:-1:3])
    for share in (4, 3):  # the middle half, the middle third
        middle = layers[num_layers // share : num_layers - num_layers // share]
        yield SkipSet(attn=middle, mlp=middle)
    yield SkipSet(attn=layers[1:-1])
    yield SkipSet(attn=layers[1::2])
    count = min(num_layers - 1, MOST_EARLY_EXITS)
    for step in range(1, count + 1):
        yield SkipSet.early_exit(max(1, step * num_layers // (count + 1)), num_layers)
    yield SkipSet()


def nested(order: Sequence[Sublayer]) -> Iterator[SkipSet]:
    """Skip sets that grow along `order`, from a quarter of the sub-layers to seven eighths."""
    for eighths in (4, 5, 3, 6, 2, 7):
        yield skip_set_of(order[: len(order) * eighths // 8])


def every_set(num_layers: int) -> Iterator[SkipSet]:
    """All there are, the small ones first: for models that have few."""
    every = sublayers(num_layers)
    return (skip_set_of(skipped) for count in range(len(every) + 1) for skipped in combinations(every, count))


def flipped(skip_set: SkipSet, *changed: Sublayer) -> SkipSet:
    """The set with these sub-layers run that it skips, and skipped that it runs."""
    return skip_set_of(set(skip_set) ^ set(changed))


def sublayer_name(sublayer: Sublayer) -> str:
    return f"{sublayer[0]}_{sublayer[1]}"
