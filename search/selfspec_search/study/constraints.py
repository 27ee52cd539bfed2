"""Constraints: limits on the cost of a draft and on the memory of its draft weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from transformers import PreTrainedModel

from selfspec.models.draft_weights import draft_weight_bytes
from selfspec.plan.draft_spec import DraftSpec
from selfspec_search.settings import SearchSettings
from selfspec_search.study.objective import Prices


@dataclass(frozen=True, kw_only=True)
class LimitCheck:
    """The cost and memory of a draft, compared with the limits."""

    draft_cost: float  # of a draft step, as a share of the whole model's step; infinite if the draft has no cost here
    draft_bytes: int  # of the draft weights
    excess: dict[str, float]  # by limit, the relative excess; at most 0 if feasible, as in Optuna's constraints

    @property
    def is_feasible(self) -> bool:
        """Whether the draft has a cost here and is within all limits."""
        return self.draft_cost < inf and all(excess <= 0 for excess in self.excess.values())


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a search."""

    cost: float | None = None  # the most that a draft step may cost, as a share of the whole model's step
    memory: int | None = None  # the most bytes of draft weights
    bytes_of: Callable[[DraftSpec], int] = lambda draft_spec: 0  # the bytes of a draft spec's draft weights

    @classmethod
    def of(cls, model: PreTrainedModel, settings: SearchSettings) -> Limits:
        """The limits that the settings name."""
        memory, cost = settings.draft_memory, settings.max_draft_cost
        return cls(cost=cost, memory=memory, bytes_of=lambda draft_spec: draft_weight_bytes(model, draft_spec))

    def check(self, draft_spec: DraftSpec, prices: Prices) -> LimitCheck:
        """Compute a draft's cost and memory, and compare both with the limits."""
        costs, taken = prices.costs, self.bytes_of(draft_spec)
        cost = costs.draft_step(draft_spec) / costs.draft_step(DraftSpec()) if costs.knows(draft_spec) else inf
        excess = {} if self.cost is None else {"draft_cost": cost - self.cost}
        if self.memory is not None:
            excess["draft_memory"] = taken / max(1, self.memory) - 1
        return LimitCheck(draft_cost=cost, draft_bytes=taken, excess=excess)
