"""Layer skipping: the model without its skip set drafts; and what all drafters share that draft a token a pass."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from selfspec.decoding.acceptance import Draft, Origin
from selfspec.decoding.drafter import Drafter
from selfspec.decoding.logits_processors import process
from selfspec.decoding.request import Request
from selfspec.decoding.sampling import next_tokens, to_probs
from selfspec.runtime.runtime import Runtime


class StepwiseDrafter(Drafter):
    """Drafts one token of every row in each pass.

    A row stops drafting where the largest softmax of the draft's raw logits falls below `exit_threshold`; the draft
    ends when every row has stopped. The threshold applies before logits processors and before a token is drawn: a
    threshold on the drawn token's own probability would bias the committed text.
    """

    def __init__(self, runtime: Runtime, gamma: int, exit_threshold: float | None = None) -> None:
        self.runtime, self.gamma, self.exit_threshold = runtime, gamma, exit_threshold
        self.unsafe_tokens = runtime.unsafe_tokens
        if exit_threshold is not None:
            self.uncaptured_reason = "with an exit threshold, the host reads the device after every drafted token"

    @abstractmethod
    def _logits(self, request: Request, token: Tensor, step: int) -> Tensor:
        """Logits `b 1 v` after `token` (`b`): the last committed token, or the token drafted in the step before.

        Leaves each row's cache length at the number of tokens before `token`."""

    def _limits(self, request: Request, n: int) -> Tensor:
        """The most tokens that each row may draft, `b`."""
        return request.draft_limits(n)

    def draft(self, request: Request, n: int, among: Tensor | None = None) -> Draft:
        """Draft in the rows `among` (`b`; None for all rows)."""
        lengths, start = self.runtime.cache.lengths, self.runtime.cache.lengths.clone()
        limits = self._limits(request, n)  # b
        if among is not None:
            limits = limits * among
        drafted, token = torch.zeros_like(limits), request.last_tokens()  # b
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        steps = 0
        for step in range(n):
            logits = self._logits(request, token, step)  # b 1 v
            steps += 1
            going = (drafted == step) & (step < limits)
            if self.exit_threshold is not None:
                going &= to_probs(logits[:, 0]).amax(dim=-1) >= self.exit_threshold
                if not going.any():
                    break
            drafted += going
            token, q = self._next(request, logits, step, among)
            tokens.append(token)
            if q is not None:
                probs.append(q)
            lengths += 1
        lengths.copy_(start)
        if not tokens:
            return Draft.empty(request.rows, limits.device, steps)
        return Draft(torch.stack(tokens, dim=1), drafted, torch.stack(probs, dim=1) if probs else None, steps)

    def _next(self, request: Request, logits: Tensor, step: int, among: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The next tokens and q for logits `b 1 v`; writes the tokens into `request.sequences`, in rows `among`."""
        ends = (request.ends + step)[:, None]  # b 1
        scores = process(request.processors, logits, request.sequences, ends)[:, 0]
        if self.unsafe_tokens is not None:
            scores = self.unsafe_tokens.excluded(scores)
        token, q = next_tokens(scores, sampling=request.sampling)
        written = token if among is None else torch.where(among, token, request.sequences.gather(1, ends)[:, 0])
        request.sequences.scatter_(1, ends, written[:, None])
        return token, q


class LayerSkipDrafter(StepwiseDrafter):
    """Drafts with the runtime's draft view: the model without its skip set."""

    key = "layers"

    @property
    def label(self) -> str:
        return f"layers {self.gamma}"

    def origin(self, row: int) -> Origin | None:
        return "layers"

    def _logits(self, request: Request, token: Tensor, step: int) -> Tensor:
        return self.runtime.run("draft", token[:, None])
