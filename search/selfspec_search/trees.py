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
        if not way.gamma or not context_free:
            return None, None
        trees = [tree for tree in TREES if way.gamma + tree.siblings < len(costs.rounds)]
        found = self._branching(prediction, trees) if trees else {}
        best: tuple[Prediction | None, Branching | None] = None, None
        least = prediction.speedup * (1 + INDIFFERENCE)
        for tree, branching in found.items():
            prices = replace(self.prices, branching={tree: branching})
            drafting = replace(way, tree=tree)
            figures = with_siblings(prediction.figures, drafting, prices)
            if figures.speedup > least:
                least, best = figures.speedup, (replace(prediction, drafting=drafting, figures=figures), branching)
        return best

    def _branching(self, prediction: Prediction, trees: Sequence[Tree]) -> dict[Tree, Branching]:
        """What each tree does: by decoding texts, and by the clock."""
        settings, gamma = self.settings, prediction.drafting.gamma
        runtime = Runtime(
            self.model, prediction.recipe, backend=settings.backend, compile=settings.compile, copies=Copies(self.model)
        )
        runtime.padding = padding_of(prediction.recipe, self.padding)
        some = self.texts[:: max(1, len(self.texts) // (TEXTS * settings.rows))][: TEXTS * settings.rows]
        totals = {tree: self._decoded(runtime, prediction, tree, some) for tree in trees}
        shortest, most = min(map(len, some)), max(tree.siblings for tree in trees)
        cached = torch.stack([some[row % len(some)].tokens[:shortest] for row in range(settings.rows)])
        runtime.reserve(settings.rows, shortest + 3 * (gamma + most) + 5)
        seconds = branching_seconds(
            runtime, cached.to(self.model.device), gamma, trees, self.prices.costs.rounds, settings.sampling
        )
        return {
            tree: Branching(
                gained=total.rescued / max(1, total.rounds),
                rescued=total.rescued / max(1, total.failed),
                seconds=seconds[tree],
            )
            for tree, total in totals.items()
        }

    def _decoded(self, runtime: Runtime, prediction: Prediction, tree: Tree, texts: Sequence[Text]) -> Stats:
        """Counts of writing these texts again with siblings."""
        way, rows, total = replace(prediction.drafting, tree=tree), self.settings.rows, Stats()
        drafter = drafter_of(replace(prediction, drafting=way).plan, runtime)
        for first in range(0, len(texts), rows):
            batch = texts[first : first + rows]
            prompts = [text.tokens[: text.prompt] for text in batch]
            total.add(decode_batch(runtime, drafter, prompts, batch[0].allowed, self.settings.sampling)[1])
        return total
