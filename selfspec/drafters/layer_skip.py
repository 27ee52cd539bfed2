"""Drafting token by token; and layer skipping: the model without some of its own sub-layers drafts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from selfspec.decoding.acceptance import Draft
from selfspec.decoding.drafter import Drafter
from selfspec.decoding.logits_processors import process
from selfspec.decoding.request import Origin, Request
from selfspec.decoding.sampling import Picked, pick, to_probs
from selfspec.runtime.runtime import Runtime


class StepwiseDrafter(Drafter):
    """Drafts with passes over one token of every row.

    A row stops drafting where the largest softmax of the draft's raw logits falls below `exit_threshold`; the batch
    stops when every row has. The test looks at the draft's confidence before processors and before a token is drawn:
    testing the drawn token's own probability would bias what comes out.
    """

    def __init__(self, runtime: Runtime, gamma: int, exit_threshold: float | None = None) -> None:
        self.runtime, self.gamma, self.exit_threshold = runtime, gamma, exit_threshold
        if exit_threshold is not None:
            self.uncaptured_reason = "with an exit threshold, drafts end when the device says so"

    @abstractmethod
    def _logits(self, request: Request, token: Tensor, step: int) -> Tensor:
        """Logits `b 1 v` behind the token (`b`) that is the last one by now: committed, or drafted in the step before.

        Leaves the cache's lengths one short of it."""

    def _limits(self, request: Request, n: int) -> Tensor:
        """The most tokens that each row may draft, `b`."""
        return request.draft_limits(n)

    def draft(self, request: Request, n: int, among: Tensor | None = None) -> Draft:
        """As in every drafter; only rows `among` (`b`, all by default) draft."""
        lengths, start = self.runtime.cache.lengths, self.runtime.cache.lengths.clone()
        limits = self._limits(request, n)  # b
        if among is not None:
            limits = limits * among
        drafted = torch.zeros_like(limits)
        picked: list[Picked] = []
        token = request.last_tokens()
        steps = 0
        for step in range(n):
            logits = self._logits(request, token, step)  # b 1 v
            steps += 1
            going = self._going(logits, drafted == step) & (step < limits)
            if self.exit_threshold is not None and not going.any():
                break
            drafted += going
            picked.append(self._next(request, logits, step, among))
            token = picked[-1].token
            lengths += 1
        lengths.copy_(start)
        return self._draft_of(picked, drafted, steps)

    def _going(self, logits: Tensor, going: Tensor) -> Tensor:
        if self.exit_threshold is None:
            return going
        return going & (to_probs(logits[:, 0]).amax(dim=-1) >= self.exit_threshold)

    def _next(self, request: Request, logits: Tensor, step: int, among: Tensor | None) -> Picked:
        """Choose a token from logits `b 1 v`, and write it where the next one's context ends."""
        ends = (request.ends + step)[:, None]  # b 1
        scores = process(request.processors, logits, request.sequences, ends)[:, 0]
        picked = pick(scores, sampling=request.sampling)
        token = picked.token
        written = token if among is None else torch.where(among, token, request.sequences.gather(1, ends)[:, 0])
        request.sequences.scatter_(1, ends, written[:, None])
        return picked

    def _draft_of(self, picked: Sequence[Picked], lengths: Tensor, steps: int) -> Draft:
        if not picked:
            return Draft.empty(len(lengths), lengths.device, steps)
        sampled = [one.probs for one in picked if one.probs is not None]
        tokens = torch.stack([one.token for one in picked], dim=1)
        return Draft(tokens, lengths, torch.stack(sampled, dim=1) if sampled else None, steps=steps)


class LayerSkipDrafter(StepwiseDrafter):
    """Drafts with the runtime's draft view: the model without its skip set."""

    @property
    def key(self) -> Hashable:
        return "layers"

    @property
    def label(self) -> str:
        return f"layers {self.gamma}"

    def origin(self, row: int) -> Origin | None:
        return "layers"

    def _logits(self, request: Request, token: Tensor, step: int) -> Tensor:
        return self.runtime.run("draft", token[:, None])
