"""Cascade: prompt lookup first, and another drafter in rows where prompt lookup finds nothing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from selfspec.decoding.acceptance import Committed, Draft, Origin
from selfspec.decoding.drafter import Drafter
from selfspec.decoding.request import Request
from selfspec.decoding.sampling import one_hot
from selfspec.drafters.layer_skip import StepwiseDrafter
from selfspec.drafters.prompt_lookup import PromptLookupDrafter


class LookupFirstDrafter(Drafter):
    """Prompt lookup drafts where it finds a match; `second` (layers or a draft model) drafts in the other rows."""

    looks = True

    def __init__(self, lookup: PromptLookupDrafter, second: StepwiseDrafter) -> None:
        self.lookup, self.second = lookup, second
        self.gamma = max(lookup.gamma, second.gamma)
        self.uncaptured_reason = second.uncaptured_reason

    @property
    def key(self) -> Hashable:
        return "lookup first", self.lookup.key, self.second.key, self.second.gamma

    @property
    def label(self) -> str:
        return f"{self.lookup.label}, else {self.second.label}"

    def begin(self, request: Request) -> None:
        self.lookup.begin(request)
        self.second.begin(request)

    def choose(self, request: Request) -> tuple[Drafter, int]:
        found = [self.lookup.found(row) for row in request.unfinished()]
        second, longest = self.second.choose(request)
        if all(found) or second is not self.second:
            return self.lookup, max(found, default=0)
        return self, max(*found, longest)

    def origin(self, row: int) -> Origin | None:
        return self.lookup.origin(row) or self.second.origin(row)

    def draft(self, request: Request, n: int) -> Draft:
        hit = self.lookup.hits(request) > 0  # b
        second = self.second.draft(request, min(n, self.second.gamma), among=~hit).padded(n)
        found = self.lookup.draft(request, n)
        probs = second.probs
        if probs is not None:
            probs = torch.where(hit[:, None, None], one_hot(found.tokens, probs), probs)
        return Draft(
            torch.where(hit[:, None], found.tokens, second.tokens),
            torch.where(hit, found.lengths, second.lengths),
            probs,
            second.steps,
        )

    def look(self, request: Request) -> Tensor:
        return self.lookup.look(request)

    def observe(self, committed: Sequence[Committed]) -> None:
        self.second.observe(committed)

    def receive(self, host_values: Sequence[Sequence[int]]) -> None:
        self.lookup.receive(host_values)
