"""Timing: stretches of the real runtime and its loop that do the same work at every call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from selfspec.decoding.acceptance import Draft
from selfspec.decoding.drafter import Drafter, NoDrafter
from selfspec.decoding.request import Request
from selfspec.decoding.round import bind_buffers, is_captured, run_draft, step
from selfspec.decoding.stats import Stats
from selfspec.drafters.layer_skip import LayerSkipDrafter
from selfspec.drafters.prompt_lookup import PromptLookupDrafter
from selfspec.plan import PromptLookup
from selfspec.runtime.prefill import prefill_prompts
from selfspec.runtime.runtime import Runtime
from selfspec_search.replay.sampling_settings import Sampling
from selfspec_search.replay.texts import request_for

STEPS = 4
"""Draft length at which a step of the draft is timed. Rounds are timed by as many, too: on a busy machine the median of
long stretches and that of short ones are not to be compared."""

Call = Callable[[], Any]


class Bench:
    """What is timed at one context: the tokens in the cache when a call begins.

    Args:
        prompts: `b t`; all but the last token of each row are the context. The runtimes' cache must have room for
            them, and for three times what a call drafts.
        sampling: how tokens are chosen, greedily by default: processors and drawing are part of a step and a round.
    """

    def __init__(self, prompts: Tensor, sampling: Sampling | None = None) -> None:
        self.prompts, self.sampling = prompts, sampling

    def draft(self, runtime: Runtime) -> Call:
        """STEPS tokens drafted in every row."""
        drafter = LayerSkipDrafter(runtime, STEPS)
        request = self._begin(runtime, drafter)

        def call() -> None:
            again(runtime, request)
            run_draft(runtime, drafter, request, STEPS)

        return call

    def round(self, runtime: Runtime, n: int) -> Call:
        """STEPS rounds over `n` tokens that cost nothing to draft."""
        drafter = _Guesses(self.prompts, n)
        request = self._begin(runtime, drafter)
        stats = Stats(rows=request.rows)

        def call() -> None:
            for _ in range(STEPS):
                again(runtime, request)
                step(runtime, drafter, request, stats)

        return call

    def lookup(self, runtime: Runtime, gamma: int) -> Call:
        """STEPS times prompt lookup."""
        drafter = PromptLookupDrafter(PromptLookup(gamma=gamma))
        request = self._begin(runtime, drafter)

        def call() -> None:
            again(runtime, request)
            for _ in range(STEPS):
                drafter.look(request)

        return call

    def prefill(self, runtime: Runtime) -> Call:
        """One prefill."""
        request = self._begin(runtime, NoDrafter())
        return lambda: prefill_prompts(runtime, request.prompts, request.pads)

    def captures(self, runtime: Runtime) -> bool:
        """Whether rounds of requests like these run as graphs."""
        return is_captured(runtime, self._begin(runtime, NoDrafter()))

    def _begin(self, runtime: Runtime, drafter: Drafter) -> Request:
        """A request with room for one round: every call is that same round again.

        Its prompts need not be cached: whatever is there takes as long to attend to.
        """
        runtime.pin_longrope(self.prompts.shape[1])
        gamma = drafter.gamma
        request = request_for(
            runtime.model, list(self.prompts), 2 * gamma + 2, gamma, sampling=self.sampling, stops=False
        )
        bind_buffers(runtime, drafter, request)
        return request


def again(runtime: Runtime, request: Request) -> None:
    """Back to where the request began: other things run in between, on the same cache and buffers."""
    request.rewind()
    runtime.cache.lengths.copy_(request.ends - 1)


class _Guesses(Drafter):
    """A drafter that costs nothing: the same tokens over and over. What is left of a round is all but drafting."""

    def __init__(self, prompts: Tensor, gamma: int) -> None:
        self.gamma = gamma
        b, t = prompts.shape
        self._tokens = prompts.repeat(1, -(-gamma // t))[:, :gamma]
        self._lengths = torch.full((b,), gamma, device=prompts.device)

    @property
    def key(self) -> Hashable:
        return "guesses", id(self)

    def draft(self, request: Request, n: int) -> Draft:
        return Draft(self._tokens.clone(), self._lengths, None)  # a graph must have something to do


def share_cache(runtimes: Iterable[Runtime], rows: int, slots: int) -> None:
    """Let runtimes of one model use one cache: seven of them could take more memory than the model."""
    first, *others = runtimes
    first.reserve(rows, slots)
    for other in others:
        other.adopt_cache(first)
