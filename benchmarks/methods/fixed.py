"""Fixed: skip sets that need no search: uniform strides and early exits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from selfspec_search.space import skip_set_of, sublayers

from methods.context import RATIOS, Candidate, Context, Selection
from selfspec.plan.sublayers import SkipSet

Item = TypeVar("Item")


def stride(context: Context, budget: float, seed: int) -> Selection:
    """Evenly spaced layers and evenly spaced sub-layers at each ratio, without the first and the last layer.

    SWIFT (Xia et al., ICLR 2025, arXiv:2410.06916) observes that uniform skip sets speed decoding up.
    """
    layers = range(1, context.num_layers - 1)
    inner = [sublayer for sublayer in sublayers(context.num_layers) if sublayer[1] in layers]
    candidates = []
    for ratio in RATIOS:
        whole = evenly(layers, round(ratio * context.num_layers))
        candidates.append(Candidate(skip_set=SkipSet(attn=whole, mlp=whole), ratio=ratio))
        apart = evenly(inner, round(ratio * 2 * context.num_layers))
        candidates.append(Candidate(skip_set=skip_set_of(apart), ratio=ratio))
    return Selection(offered=candidates)


def early_exit(context: Context, budget: float, seed: int) -> Selection:
    """Every exit layer, as in LayerSkip's grid (Elhoushi et al., ACL 2024, arXiv:2404.16710)."""
    layers = context.num_layers
    exits = {layer: SkipSet.early_exit(layer, layers) for layer in range(1, layers)}
    return Selection(offered=[Candidate(skip_set=exits[layer], ratio=1 - layer / layers) for layer in exits])


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items, evenly spaced; all items if there are fewer."""
    count = min(count, len(items))
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]
