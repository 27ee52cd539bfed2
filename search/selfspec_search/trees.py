"""Trees: whether alternatives to drafted tokens would pay, found by decoding a few texts with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from selfspec.copies import Copies
from selfspec.drafting import drafter_of
from selfspec.plan import Padding, Tree
from selfspec.processors import CONTEXT_FREE
from selfspec.runtime import Runtime
from selfspec.stats import Stats
from selfspec_search.confirm import padding_of
from selfspec_search.objective import INDIFFERENCE, Prediction, Prices, with_siblings
from selfspec_search.outlooks import Branching, branching_seconds
from selfspec_search.settings import SearchSettings
from selfspec_search.texts import Text, decode_batch

TREES = (Tree(siblings=1, width=2), Tree(siblings=2), Tree(siblings=4))
"""Tried, as far as the profile has prices for the longer passes."""
TEXTS = 6
"""Decoded with each."""


@dataclass(frozen=True, kw_only=True)
class Branches:
    """Tries trees beside one way of drafting by layers.

    Attributes:
        texts: of which a few are written again, with siblings.
        padding: of passes.
    """

    model: PreTrainedModel
    settings: SearchSettings
    texts: Sequence[Text]
    prices: Prices
    padding: Padding | None

    def that_pay(self, prediction: Prediction) -> tuple[Prediction | None, Branching | None]:
        """The prediction with the best tree beside it, if any is predicted to pay; and what that tree was found to
        do. None where siblings cannot stand beside it."""
        way, costs = prediction.drafting, self.prices.costs
        context_free = all(type(one) in CONTEXT_FREE for one in self.settings.sampling.processors(self.model))
        if not way.gamma or way.threshold is not None or not context_free:
            return None, None
        trees = [tree for tree in TREES if way.gamma + tree.siblings < len(costs.rounds)]
        found = {tree: self._branching(prediction, tree) for tree in trees}
        best: tuple[Prediction | None, Branching | None] = None, None
        least = prediction.speedup * (1 + INDIFFERENCE)
        for tree, branching in found.items():
            prices = replace(self.prices, branching={tree: branching})
            drafting = replace(way, tree=tree)
            figures = with_siblings(prediction.figures, drafting, prices)
            if figures.speedup > least:
                least, best = figures.speedup, (replace(prediction, drafting=drafting, figures=figures), branching)
        return best

    def _branching(self, prediction: Prediction, tree: Tree) -> Branching:
        """What this tree does: by decoding texts, and by the clock."""
        settings, gamma, total = self.settings, prediction.drafting.gamma, Stats()
        runtime = Runtime(
            self.model, prediction.recipe, backend=settings.backend, compile=settings.compile, copies=Copies(self.model)
        )
        runtime.padding = padding_of(prediction.recipe, self.padding)
        way = replace(prediction.drafting, tree=tree)
        drafter = drafter_of(replace(prediction, drafting=way).plan, runtime)
        some = self.texts[:: max(1, len(self.texts) // (TEXTS * settings.rows))][: TEXTS * settings.rows]
        for first in range(0, len(some), settings.rows):
            batch = some[first : first + settings.rows]
            prompts = [text.tokens[: text.prompt] for text in batch]
            total.add(decode_batch(runtime, drafter, prompts, batch[0].allowed, settings.sampling)[1])
        shortest = min(map(len, some))
        cached = torch.stack([some[row % len(some)].tokens[:shortest] for row in range(settings.rows)])
        runtime.reserve(settings.rows, shortest + 3 * (gamma + tree.siblings) + 5)
        seconds = branching_seconds(
            runtime, cached.to(self.model.device), gamma, tree, self.prices.costs.rounds, settings.sampling
        )
        return Branching(
            gained=total.rescued / max(1, total.rounds),
            rescued=total.rescued / max(1, total.failed),
            seconds=seconds,
        )
