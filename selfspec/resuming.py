"""Resuming: verification goes on from the draft's own states, instead of computing them again.

Below the *boundary*, the first layer that holds a skipped or quantised sub-layer, the draft computes what the target
does. So when a round has drafted d1 .. dn, the draft's passes over the last committed token and d1 .. d(n-1) have
already cached the lower layers, and what came out of them can be kept. Then dn alone runs through the lower layers, and
all n + 1 states run through the layers from the boundary on.

Both are views like the draft's, one with the upper layers left out and one with the lower ones. States are taken and
handed over by hooks around the layers, so that nothing that a family does to its embeddings is done twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfspec.draft_view import draft_view
from selfspec.recipe import Recipe
from selfspec.sampling import Draft
from selfspec.skip_set import SkipSet
from selfspec.views import decoder_layers


def boundary_of(recipe: Recipe, num_layers: int) -> int:
    """The first layer that the draft does not compute as the target does; at most the last, which is never resumed
    behind."""
    exact = (recipe.choice("attn", layer) == recipe.choice("mlp", layer) == "keep" for layer in range(num_layers - 1))
    return next((layer for layer, is_exact in enumerate(exact) if not is_exact), num_layers - 1)


class Resuming:
    """The lower and the upper view, and the states between them.

    Args:
        model: the user's.
        draft: the draft view, whose lower layers are watched.
        boundary: the first of the upper layers.

    Attributes:
        lower: the layers below the boundary; its head means nothing.
        upper: the layers from the boundary on. Whatever tokens it is given, it begins with the states.
    """

    def __init__(self, model: PreTrainedModel, draft: PreTrainedModel, boundary: int) -> None:
        layers = len(decoder_layers(model))
        self.lower = draft_view(model, _all_of(range(boundary, layers)))
        self.upper = draft_view(model, _all_of(range(boundary)))
        self._states: list[Tensor] = []  # b 1 d each, of the last committed token and the drafted ones
        self._lengths: Tensor | None = None
        self._width = 0
        self._drafting = False
        self._hooks = [
            decoder_layers(draft)[boundary - 1].register_forward_hook(self._keep_if_drafting),
            decoder_layers(self.lower)[-1].register_forward_hook(self._keep),
            decoder_layers(self.upper)[0].register_forward_pre_hook(self._hand_over),
        ]

    def close(self) -> None:
        """Let go of the draft view, which may get another recipe."""
        for hook in self._hooks:
            hook.remove()

    def begin(self) -> None:
        """From now on, passes of the draft over one token each are kept: a draft of every row begins."""
        self._states, self._lengths, self._drafting = [], None, True

    def keep_for(self, draft: Draft) -> None:
        """What was kept since `begin` belongs to this draft."""
        self._lengths, self._width, self._drafting = draft.lengths, draft.width, False

    def has_states_of(self, draft: Draft) -> bool:
        """Whether the layers made this draft, in every row, and nothing but padding was put into it since."""
        return self._lengths is draft.lengths and bool(self._states)

    @property
    def missing(self) -> int | None:
        """Which column of a pass over the last committed token and the draft has not been through the lower layers: the
        last drafted token's, but where a look at the draft's confidence behind it took it there."""
        return self._width if len(self._states) == self._width else None

    def _keep_if_drafting(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        if self._drafting:
            self._keep(layer, args, output)

    def _keep(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        self._states.append(output[:, :1])  # a padded pass's own token comes first

    def _hand_over(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The states in the place of what was embedded, `b t d`; columns of padding get the last one's."""
        embedded, *others = args
        missing = embedded.shape[1] - len(self._states)
        states = torch.cat([*self._states, *self._states[-1:] * missing], dim=1)
        return states, *others


def _all_of(layers: range) -> SkipSet:
    return SkipSet(attn=layers, mlp=layers)
