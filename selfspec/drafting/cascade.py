"""Cascades: drafters one behind the other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from selfspec.drafting.drafter import Drafter
from selfspec.drafting.layers import LayerSkipDrafter, StepwiseDrafter
from selfspec.drafting.lookup import PromptLookupDrafter
from selfspec.processors import process
from selfspec.request import Committed, Origin, Request
from selfspec.sampling import Draft, accept, one_hot, to_probs


class LookupFirstDrafter(Drafter):
    """A cascade: prompt lookup, and layer skipping or a draft model in the rows where it found nothing."""

    looks = True

    def __init__(self, lookup: PromptLookupDrafter, second: StepwiseDrafter) -> None:
        self.lookup, self.second = lookup, second
        self.gamma = max(lookup.gamma, second.gamma)
        self.capture_obstacle = second.capture_obstacle

    @property
    def key(self) -> Hashable:
        return "lookup first", self.lookup.key, self.second.key, self.second.gamma

    @property
    def label(self) -> str:
        return f"{self.lookup.label}, else {self.second.label}"

    def begin(self, request: Request) -> None:
        self.lookup.begin(request)
        self.second.begin(request)

    def observe(self, committed: Sequence[Committed]) -> None:
        self.second.observe(committed)

    def look(self, request: Request) -> Tensor:
        return self.lookup.look(request)

    def hear(self, told: Sequence[Sequence[int]]) -> None:
        self.lookup.hear(told)

    def choose(self, request: Request) -> tuple[Drafter, int]:
        found = self.lookup.found_in_unfinished(request)
        second, longest = self.second.choose(request)
        if all(found) or second is not self.second:
            return self.lookup, max(found, default=0)
        return self, max(*found, longest)

    def origin(self, row: int) -> Origin | None:
        return self.lookup.origin(row) or self.second.origin(row)

    def draft(self, request: Request, n: int) -> Draft:
        if self.second.runtime.resuming is not None and not any(self.lookup.found_in_unfinished(request)):
            return self.second.draft(request, min(n, self.second.gamma))  # in every row, so that its states serve
        hit = self.lookup.hits(request) > 0  # b
        made = self.second.draft(request, min(n, self.second.gamma), among=~hit).padded(n)
        found = self.lookup.draft(request, n)
        return Draft(
            torch.where(hit[:, None], found.tokens, made.tokens),
            torch.where(hit, found.lengths, made.lengths),
            _mixed(hit, found.tokens, made.probs),
            made.steps,
        )


class CheckedLookupDrafter(Drafter):
    """A cascade the other way round: the draft checks what is looked up, in one pass of its own, and what comes
    through, with the draft's own next token, goes to the target (the vertical cascade of Chen et al. 2023,
    arXiv:2312.11462).

    Tokens that the draft accepts follow its q, as its own do, so the target's check is exact whatever was looked up.
    Where nothing was found in any row, layers draft token by token.
    """

    looks = True

    def __init__(self, lookup: PromptLookupDrafter, layers: LayerSkipDrafter) -> None:
        self.lookup, self.layers = lookup, layers
        self.gamma = max(lookup.gamma + 1, layers.gamma)

    @property
    def key(self) -> Hashable:
        return "checked lookup", self.lookup.key

    @property
    def label(self) -> str:
        return f"{self.lookup.label} checked by layers"

    def begin(self, request: Request) -> None:
        self.lookup.begin(request)

    def look(self, request: Request) -> Tensor:
        return self.lookup.look(request)

    def hear(self, told: Sequence[Sequence[int]]) -> None:
        self.lookup.hear(told)

    def choose(self, request: Request) -> tuple[Drafter, int]:
        found = max(self.lookup.found_in_unfinished(request), default=0)
        if not found:
            return self.layers.choose(request)
        return self, min(found + 1, request.longest_draft(self.gamma))

    def origin(self, row: int) -> Origin | None:
        return "layers"

    def draft(self, request: Request, n: int) -> Draft:
        found = self.lookup.draft(request, n - 1)
        tokens = torch.cat([request.last_tokens()[:, None], found.tokens], dim=1)  # b n
        columns = request.ends[:, None] + torch.arange(n, device=tokens.device)
        scores = process(request.processors, self.layers.runtime.run("draft", tokens), request.sequences, columns)
        checked = accept(found, scores, sampling=request.sampling)
        drafted = torch.nn.functional.pad(found.tokens, (0, 1))
        drafted.scatter_(1, checked.accepted[:, None], checked.following[:, None])
        request.sequences.scatter_(1, columns, drafted)
        lengths = torch.minimum(checked.accepted + 1, request.draft_limits(n))
        return Draft(drafted, lengths, to_probs(scores) if request.sampling else None, steps=1)


def _mixed(hit: Tensor, tokens: Tensor, probs: Tensor | None) -> Tensor | None:
    """q of a draft whose `hit` rows were looked up: all on the drafted token there."""
    if probs is None:
        return None
    return torch.where(hit[:, None, None], one_hot(tokens, probs), probs)
