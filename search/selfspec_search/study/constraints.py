"""Limits: what a draft may cost, and what memory it may take beside the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from transformers import PreTrainedModel

from selfspec.models.draft_weights import draft_weight_bytes
from selfspec.plan.draft_spec import DraftSpec
from selfspec_search.settings import SearchSettings
from selfspec_search.study.objective import Prices, draft_cost


def limits_of(model: PreTrainedModel, settings: SearchSettings) -> Limits:
    """Those that a search was given."""
    return Limits(
        cost=settings.max_draft_cost,
        memory=settings.draft_memory,
        bytes_of=lambda draft_spec: draft_weight_bytes(model, draft_spec),
    )


@dataclass(frozen=True, kw_only=True)
class LimitCheck:
    """What a draft costs and takes, held against the limits.

    Attributes:
        draft_cost: of a step, as a share of the whole model's; infinite where the draft has no price here.
        draft_bytes: that it takes beside the model.
        excess: by limit, relatively: feasible if at most 0, as Optuna takes constraints.
    """

    draft_cost: float
    draft_bytes: int
    excess: dict[str, float]

    @property
    def is_feasible(self) -> bool:
        """Whether the draft has a price and is within all limits."""
        return self.draft_cost < inf and all(excess <= 0 for excess in self.excess.values())


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is feasible.

    Args:
        cost: the most that a step of the draft may cost, as a share of the whole model's; None for no limit.
        memory: bytes that its own layers may take; None for no limit.
        bytes_of: what a draft spec takes.
    """

    cost: float | None = None
    memory: int | None = None
    bytes_of: Callable[[DraftSpec], int] = lambda draft_spec: 0

    def check(self, draft_spec: DraftSpec, prices: Prices) -> LimitCheck:
        """Price a draft, and hold it against the limits."""
        cost = draft_cost(draft_spec, prices) if prices.costs.knows(draft_spec) else inf
        taken = self.bytes_of(draft_spec)
        excess = {} if self.cost is None else {"draft_cost": cost - self.cost}
        if self.memory is not None:
            excess["draft_memory"] = taken / max(1, self.memory) - 1
        return LimitCheck(draft_cost=cost, draft_bytes=taken, excess=excess)
