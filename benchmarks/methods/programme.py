"""Programme: the dynamic programme that CLaSp and KnapSpec share.

Steps (layers or sub-layers) are decided one after the other. Of all ways to skip steps of one total weight, the
programme keeps only the way whose hidden states are most similar to the target's. That is the papers' approximation: a
way that is less similar now may become more similar later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Way:
    """Steps skipped so far, the resulting hidden states, and their similarity to the target's."""

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
    """The best way through all steps, by skipped weight.

    Args:
        start: hidden states before the first step.
        targets: the target's hidden states after each step.
        apply: the hidden states after a step, from the step and the states before it.
        weights: of each step.
        similarity: of two tensors of hidden states.
        kept: steps that are never skipped.
        floor: the least similarity of a way that is continued.
    """
    ways = {0: Way((), start, 1.0)}
    for step, (target, weight) in enumerate(zip(targets, weights, strict=True)):
        found: dict[int, Way] = {}
        for saved, way in ways.items():
            after = apply(step, way.states)
            _offer(found, saved, Way(way.skipped, after, similarity(after, target)), floor)
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
