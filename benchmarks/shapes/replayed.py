"""Replayed: agreement and tokens per round of drafts of the embedded model, by replay."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from selfspec_search.replay.replay import Replay
from selfspec_search.replay.rounds import Drafting, agreement, rounds_of
from selfspec_search.space import Sublayer, skip_set_of, sublayers
from transformers import PreTrainedModel

from selfspec import DraftSpec, SkipSet
from selfspec.models.draft_weights import DraftWeights, branch

GAMMA = 4


@dataclass(frozen=True, kw_only=True)
class Rightness:
    """Figures of one draft, in rounds of up to `GAMMA` drafted tokens."""

    first: float  # agreement at depth 0, over all positions of the texts
    by_depth: list[float]  # agreement in the rounds that decoding would go through
    acceptance: float
    tokens_per_round: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "agreement": round(self.first, 4),
            "agreement_by_depth": [round(share, 4) for share in self.by_depth],
            "acceptance_rate": round(self.acceptance, 4),
            "tokens_per_round": round(self.tokens_per_round, 4),
        }


def rightness(replay: Replay, draft_spec: DraftSpec, draft_weights: DraftWeights | None = None) -> Rightness:
    """The figures of a draft; `draft_weights` replaces the draft's own copies."""
    if draft_weights is not None:
        replay = copy(replay)
        replay.draft_weights = draft_weights
    table, way = replay.run(draft_spec), Drafting(GAMMA)
    replayed = rounds_of(table, [way])
    rounds, drafted = replayed.visits.sum(), (replayed.visits * replayed.drafted).sum()
    return Rightness(
        first=table.agreement,
        by_depth=agreement(table, way),
        acceptance=float((replayed.visits * replayed.accepted).sum() / drafted) if drafted else 0.0,
        tokens_per_round=float(table.written.sum() / rounds),
    )


def by_sensitivity(replay: Replay) -> list[Sublayer]:
    """All sub-layers, by the agreement that skipping one sub-layer costs per saved weight, the least first."""
    model = replay.view
    weights = {kind: _parameters(model, kind) for kind in ("attn", "mlp")}
    lost = {
        one: 1 - replay.first_depth(skip_set_of([one])).agreement for one in sublayers(model.config.num_hidden_layers)
    }
    return sorted(lost, key=lambda one: lost[one] / weights[one[0]])


def least_important(order: Sequence[Sublayer], share: float) -> SkipSet:
    """The first `share` of the sub-layers."""
    return skip_set_of(order[: round(share * len(order))])


def _parameters(model: PreTrainedModel, kind: str) -> int:
    return sum(parameter.numel() for parameter in branch(model, kind, 0).parameters())
