"""Limits: what a draft may cost, and what memory it may take beside the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from selfspec.models.draft_weights import copied_bytes
from selfspec.plan.draft_spec import Recipe
from selfspec_search.settings import SearchSettings
from selfspec_search.study.objective import Prices, draft_cost


def limits_of(model: PreTrainedModel, settings: SearchSettings) -> Limits:
    """Those that a search was given."""
    return Limits(
        cost=settings.max_draft_cost,
        memory=settings.draft_memory,
        bytes_of=lambda recipe: copied_bytes(model, recipe),
    )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is feasible.

    Args:
        cost: the most that a step of the draft may cost, as a share of the whole model's; None for no limit.
        memory: bytes that its own layers may take; None for no limit.
        bytes_of: what a recipe takes.
    """

    cost: float | None = None
    memory: int | None = None
    bytes_of: Callable[[Recipe], int] = lambda recipe: 0
    _known: dict[Recipe, int] = field(default_factory=dict, init=False)

    def bytes(self, recipe: Recipe) -> int:
        """What a draft by this recipe takes beside the model."""
        if recipe not in self._known:
            self._known[recipe] = self.bytes_of(recipe)
        return self._known[recipe]

    def excess(self, recipe: Recipe, prices: Prices) -> dict[str, float]:
        """By limit, relatively: feasible if at most 0, as Optuna takes constraints."""
        excess = {} if self.cost is None else {"draft_cost": draft_cost(recipe, prices) - self.cost}
        if self.memory is not None:
            excess["draft_memory"] = self.bytes(recipe) / max(1, self.memory) - 1
        return excess

    def allow(self, recipe: Recipe, prices: Prices) -> bool:
        """Whether a draft may be made like this, and can be priced."""
        return prices.costs.knows(recipe) and all(excess <= 0 for excess in self.excess(recipe, prices).values())

    def record(self, recipe: Recipe, prices: Prices) -> dict[str, Any]:
        """What to keep of a recipe beside what came of it."""
        return {"draft_cost": draft_cost(recipe, prices), "draft_bytes": self.bytes(recipe)}
