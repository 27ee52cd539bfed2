"""Timed calls: parts of rounds, run by the runtime, that do the same work at every call."""

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
from selfspec.plan.lookup import PromptLookup
from selfspec.runtime.prefill import prefill_prompts
from selfspec.runtime.runtime import Runtime
from selfspec_search.replay.sampling_settings import Sampling
from selfspec_search.replay.texts import request_for

STEPS = 4
"""Draft steps, and rounds, in one timed call. On a busy machine, medians of long and short calls do not compare."""

Call = Callable[[], Any]


class TimedCalls:
    """Calls to time at one context, which is the number of tokens in the cache when a call begins.

    Args:
        prompts: `b t`; all but the last token of each row are the context. The cache needs `t` slots, and three times
            the draft length of a call.
        sampling: how tokens are chosen, greedily by default. Draft steps and rounds process logits and draw tokens.
    """

    def __init__(self, prompts: Tensor, sampling: Sampling | None = None) -> None:
        self.prompts, self.sampling = prompts, sampling

    def draft(self, runtime: Runtime) -> Call:
        """Draft STEPS tokens in every row."""
        drafter = LayerSkipDrafter(runtime, STEPS)
        request = self._begin(runtime, drafter)

        def call() -> None:
            rewind(runtime, request)
            run_draft(runtime, drafter, request, STEPS)

        return call

    def round(self, runtime: Runtime, n: int) -> Call:
        """Run STEPS rounds over `n` drafted tokens whose drafting takes no time."""
        drafter = _ConstantDrafter(self.prompts, n)
        request = self._begin(runtime, drafter)
        stats = Stats(rows=request.rows)

        def call() -> None:
            for _ in range(STEPS):
                rewind(runtime, request)
                step(runtime, drafter, request, stats)

        return call

    def lookup(self, runtime: Runtime, gamma: int) -> Call:
        """Run prompt lookup STEPS times."""
        drafter = PromptLookupDrafter(PromptLookup(gamma=gamma))
        request = self._begin(runtime, drafter)

        def call() -> None:
            rewind(runtime, request)
            for _ in range(STEPS):
                drafter.look(request)

        return call

    def prefill(self, runtime: Runtime) -> Call:
        """Run one prefill."""
        request = self._begin(runtime, NoDrafter())
        return lambda: prefill_prompts(runtime, request.prompts, request.pads)

    def captures(self, runtime: Runtime) -> bool:
        """Whether the rounds of these requests run as CUDA graphs."""
        return is_captured(runtime, self._begin(runtime, NoDrafter()))

    def _begin(self, runtime: Runtime, drafter: Drafter) -> Request:
        """A request with room for one round, which every call repeats.

        The prompts are not prefilled: attention takes as long on any cached keys.
        """
        runtime.pin_longrope(self.prompts.shape[1])
        room, prompts = 2 * drafter.gamma + 2, list(self.prompts)
        request = request_for(runtime.model, prompts, room, drafter.gamma, sampling=self.sampling, stops=False)
        bind_buffers(runtime, drafter, request)
        return request


def rewind(runtime: Runtime, request: Request) -> None:
    """Set the request and the cache back to the first round. Other calls use the same cache and buffers."""
    request.rewind()
    runtime.cache.lengths.copy_(request.ends - 1)


class _ConstantDrafter(Drafter):
    """Drafts the same tokens in every round at no cost, so that a round's time excludes drafting."""

    def __init__(self, prompts: Tensor, gamma: int) -> None:
        self.gamma = gamma
        b, t = prompts.shape
        self._tokens = prompts.repeat(1, -(-gamma // t))[:, :gamma]
        self._lengths = torch.full((b,), gamma, device=prompts.device)

    @property
    def key(self) -> Hashable:
        return "constant", id(self)

    def draft(self, request: Request, n: int) -> Draft:
        return Draft(self._tokens.clone(), self._lengths, None)  # a captured graph needs at least one kernel


def share_cache(runtimes: Iterable[Runtime], rows: int, slots: int) -> None:
    """Let runtimes of one model share a cache: a cache for each could take more memory than the model."""
    first, *others = runtimes
    first.reserve(rows, slots)
    for other in others:
        other.adopt_cache(first)
