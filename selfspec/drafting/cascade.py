"""Cascades: drafters one behind the other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from selfspec.drafting.drafter import Drafter
from selfspec.drafting.layers import LayerSkipDrafter
from selfspec.drafting.lookup import PromptLookupDrafter
from selfspec.request import Origin, Request
from selfspec.sampling import Draft, one_hot


class LookupFirstDrafter(Drafter):
    """A cascade: prompt lookup, and layer skipping in the rows where it found nothing."""

    looks = True

    def __init__(self, lookup: PromptLookupDrafter, layers: LayerSkipDrafter) -> None:
        self.lookup, self.layers = lookup, layers
        self.gamma, self.siblings = max(lookup.gamma, layers.gamma), layers.siblings
        self.capture_obstacle = layers.capture_obstacle

    @property
    def key(self) -> Hashable:
        return "lookup first", self.lookup.key, self.layers.key

    @property
    def label(self) -> str:
        return f"{self.lookup.label}, else {self.layers.label}"

    def look(self, request: Request) -> Tensor:
        return self.lookup.look(request)

    def hear(self, told: Sequence[Sequence[int]]) -> None:
        self.lookup.hear(told)

    def choose(self, request: Request) -> tuple[Drafter, int]:
        found = self.lookup.found_in_unfinished(request)
        if all(found):
            return self.lookup, max(found, default=0)
        return self, max(*found, request.longest_draft(self.layers.gamma))

    def steps(self, n: int) -> int:
        return self.layers.steps(min(n, self.layers.gamma))

    def origin(self, row: int) -> Origin | None:
        return self.lookup.origin(row) or self.layers.origin(row)

    def draft(self, request: Request, n: int) -> Draft:
        if self.layers.runtime.resuming is not None and not any(self.lookup.found_in_unfinished(request)):
            return self.layers.draft(request, min(n, self.layers.gamma))  # in every row, so that its states serve
        hit = self.lookup.hits(request) > 0  # b
        made = self.layers.draft(request, min(n, self.layers.gamma), among=~hit).padded(n)
        found = self.lookup.draft(request, n)
        return Draft(
            torch.where(hit[:, None], found.tokens, made.tokens),
            torch.where(hit, found.lengths, made.lengths),
            _mixed(hit, found.tokens, made.probs),
            made.siblings,  # none of them valid where nothing was made
        )


def _mixed(hit: Tensor, tokens: Tensor, probs: Tensor | None) -> Tensor | None:
    """q of a draft whose `hit` rows were looked up: all on the drafted token there."""
    if probs is None:
        return None
    return torch.where(hit[:, None, None], one_hot(tokens, probs), probs)
