"""Trees: layer skipping that also drafts alternatives to the tokens of which it is least sure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from selfspec.drafting.layers import LayerSkipDrafter
from selfspec.plan import Tree
from selfspec.request import Request
from selfspec.runtime import Runtime
from selfspec.sampling import Draft, Picked, Siblings, pick_several


class TreeDrafter(LayerSkipDrafter):
    """Layer skipping with siblings: leaves beside the drafted tokens, all checked in one pass.

    Where the draft's first wrong token has a sibling that the target accepts, the round commits one token more. The
    siblings go where the draft expects to fail: the place of the j-th likeliest token at a depth is worth its
    probability times that of the round's getting there, by the draft's own odds. Drawing is without replacement, so
    what comes out keeps the target's distribution (see `sampling.accept`).

    Where a logits processor looks at the tokens before, a sibling would need a context of its own; there are none then.
    """

    def __init__(self, runtime: Runtime, gamma: int, tree: Tree, exit_threshold: float | None = None) -> None:
        super().__init__(runtime, gamma, exit_threshold)
        self.tree, self.siblings = tree, tree.siblings

    @property
    def key(self) -> Hashable:
        return "tree", self.tree.siblings, self.tree.width

    @property
    def label(self) -> str:
        return f"{super().label} + {self.tree.siblings} siblings"

    def _pick(self, request: Request, scores: Tensor) -> Picked:
        if not request.is_context_free:
            return super()._pick(request, scores)
        return pick_several(scores, min(self.tree.width, scores.shape[-1]) - 1, sampling=request.sampling)

    def _draft_of(self, picked: Sequence[Picked], lengths: Tensor, steps: int) -> Draft:
        draft = super()._draft_of(picked, lengths, steps)
        if not picked or picked[0].alternatives is None:
            return draft
        siblings = choose_siblings(picked, lengths, self.tree.siblings)
        return Draft(draft.tokens, draft.lengths, draft.probs, siblings, draft.steps)


def choose_siblings(picked: Sequence[Picked], lengths: Tensor, most: int) -> Siblings:
    """The alternatives that promise most, up to `most` in each row, by depth.

    How many a depth gets follows from the odds, and so from q and the tokens drafted before: never from which
    alternatives were drawn, of which it gets the first ones.
    """
    alternatives, possible, odds = (
        torch.stack([getattr(one, name) for one in picked], dim=1) for name in ("alternatives", "possible", "odds")
    )  # b n k, b n k, b n k+1
    n, k = alternatives.shape[1:]
    reach = torch.cat([torch.ones_like(odds[:, :1, 0]), odds[:, :-1, 0].cumprod(dim=1)], dim=1)  # b n
    worth = reach[..., None] * odds[..., 1:]
    drafted = torch.arange(n, device=lengths.device) < lengths[:, None]  # b n
    worth = torch.where(drafted[..., None], worth, -1.0).flatten(1)
    depths = worth.topk(min(most, n * k), dim=1).indices.sort(dim=1).values // k  # b m
    m = torch.arange(depths.shape[1], device=depths.device)
    same = (depths[:, :, None] == depths[:, None]) & (m < m[:, None])  # b m m, those before it at its depth
    places = depths * k + same.sum(dim=2)
    valid = possible.flatten(1).gather(1, places) & (depths < lengths[:, None])
    return Siblings(alternatives.flatten(1).gather(1, places), depths, valid)
