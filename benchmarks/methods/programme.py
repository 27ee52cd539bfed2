"""Programme: the dynamic programme that CLaSp and KnapSpec share.

Steps (layers, or sub-layers) are decided one after the other. Of all ways to leave out steps of one total weight, only
the way whose hidden states are the most like the target's is kept, with its states. That is the papers' approximation:
a way that is behind now may be ahead later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Way:
    """Steps left out so far, the hidden states that they lead to, and how much these are like the target's."""

    skipped: tuple[int, ...]
    states: Tensor
    similarity: float


def best_ways(
    start: Tensor,
    targets: Sequence[Tensor],
    apply: Callable[[int, Tensor], Tensor],
    weights: Sequence[int],
    *,
    similarity: Callable[[Tensor, Tensor], float],
    kept: Collection[int] = (),
    floor: float = -1.0,
) -> dict[int, Way]:
    """By the weight left out, the best way through all steps.

    Args:
        start: hidden states in front of the first step.
        targets: the target's hidden states behind each step.
        apply: the states behind a step, from those in front of it.
        weights: of each step.
        similarity: of two tensors of hidden states.
        kept: steps that are never left out.
        floor: ways less similar than this are given up.
    """
    ways = {0: Way((), start, 1.0)}
    for step, (target, weight) in enumerate(zip(targets, weights, strict=True)):
        found: dict[int, Way] = {}
        for saved, way in ways.items():
            behind = apply(step, way.states)
            _offer(found, saved, Way(way.skipped, behind, similarity(behind, target)), floor)
            if step not in kept:
                skipped = Way((*way.skipped, step), way.states, similarity(way.states, target))
                _offer(found, saved + weight, skipped, floor)
        ways = found
    return ways


def _offer(found: dict[int, Way], saved: int, way: Way, floor: float) -> None:
    if way.similarity >= floor and (saved not in found or way.similarity > found[saved].similarity):
        found[saved] = way


def mean_cosine(counted: Tensor) -> Callable[[Tensor, Tensor], float]:
    """Cosine similarity of `b t d` and `b t d`, averaged over the tokens `counted` (`b t`)."""

    def similarity(one: Tensor, other: Tensor) -> float:
        return float(nn.functional.cosine_similarity(one.float(), other.float(), dim=-1)[counted].mean())

    return similarity
