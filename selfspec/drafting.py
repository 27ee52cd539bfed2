"""Drafters: who guesses the next tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from selfspec.processors import process
from selfspec.request import Request
from selfspec.runtime import Runtime
from selfspec.sampling import Draft, pick, to_probs


class Drafter(Protocol):
    """Guesses up to `gamma` tokens behind each row's committed ones."""

    gamma: int

    def draft(self, request: Request) -> Draft:
        """Write the drafted tokens behind the committed ones in `request.sequences`, and return them.

        Leaves the cache's lengths as it found them.
        """


@dataclass
class NoDrafter:
    """Plain decoding: drafts nothing, so a round is one token."""

    gamma: int = 0

    def draft(self, request: Request) -> Draft:
        return Draft.empty(request.rows, request.sequences.device)


@dataclass
class LayerSkipDrafter:
    """Drafts with the runtime's draft view: the model without its skip set.

    A row stops drafting where the largest softmax of the draft's raw logits falls below `exit_threshold`; the batch
    stops when every row has. The test looks at the draft's confidence before processors and before a token is drawn:
    testing the drawn token's own probability would bias what comes out.
    """

    runtime: Runtime
    gamma: int
    exit_threshold: float | None = None

    def draft(self, request: Request) -> Draft:
        lengths, start = self.runtime.cache.lengths, self.runtime.cache.lengths.clone()
        limits = request.draft_limits(self.gamma)  # b
        drafted = torch.zeros_like(limits)
        tokens, probs = [], []
        token = request.last_tokens()
        for step in range(int(limits.max())):
            logits = self.runtime.run("draft", token[:, None])  # b 1 v
            going = self._going(logits, drafted == step) & (step < limits)
            if self.exit_threshold is not None and not going.any():
                break
            drafted += going
            token, q = self._next_token(request, logits, step)
            tokens.append(token)
            probs.append(q)
            lengths += 1
        lengths.copy_(start)
        if not tokens:
            return Draft.empty(request.rows, lengths.device)
        sampled = [q for q in probs if q is not None]
        return Draft(torch.stack(tokens, dim=1), drafted, torch.stack(sampled, dim=1) if sampled else None)

    def _going(self, logits: Tensor, going: Tensor) -> Tensor:
        if self.exit_threshold is None:
            return going
        return going & (to_probs(logits[:, 0]).amax(dim=-1) >= self.exit_threshold)

    def _next_token(self, request: Request, logits: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        ends = request.ends + step  # b
        scores = process(request.processors, logits, request.sequences, ends[:, None])[:, 0]
        token, q = pick(scores, sampling=request.sampling)
        request.sequences.scatter_(1, ends[:, None], token[:, None])
        return token, q
