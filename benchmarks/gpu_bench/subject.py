"""Subject: one shape, built, with the skip set of its cells and everything that decodes with it."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

import selfspec
from gpu_bench.agreement import Dial, published_share
from gpu_bench.shapes import Shape
from selfspec import Plan, SelfSpeculator, SkipSet


class Subject:
    """A model with random weights, as all cells of one shape share it.

    Attributes:
        scales: by skip set and agreement wanted, the scale that came nearest so far: where the next cell begins.
    """

    def __init__(self, shape: Shape, device: torch.device, seed: int) -> None:
        self.shape, self.device, self.seed = shape, device, seed
        self.model = shape.build(device, seed)
        self.num_layers: int = self.model.config.num_hidden_layers
        self.skip_set = published_share(self.num_layers)
        self.dial = Dial(self.model, seed)
        self.scales: dict[tuple[SkipSet, float], float] = {}
        self._specs: dict[tuple[SkipSet, int], SelfSpeculator] = {}

    def plain(self) -> SelfSpeculator:
        """The model in our runtime, without a draft."""
        return self._spec(SkipSet(), 0)

    def drafting(self, skip_set: SkipSet, gamma: int) -> SelfSpeculator:
        """Ours, with drafts of `gamma` tokens without `skip_set`."""
        return self._spec(skip_set, gamma)

    def _spec(self, skip_set: SkipSet, gamma: int) -> SelfSpeculator:
        key = (skip_set, gamma)
        if key not in self._specs:  # kept: each compiles and captures passes of its own
            plan = Plan(skip_set=skip_set, gamma=gamma)
            # Fixed: the ideal is that of this draft length, in every round.
            self._specs[key] = selfspec.wrap(self.model, plan, policy="fixed")
        return self._specs[key]

    def forget(self) -> None:
        """Free the caches of all that decoded so far."""
        self._specs.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prompts(self, count: int, rows: int, length: int, *, seed: int = 1) -> list[Tensor]:
        """So many batches of random tokens, each `rows length`."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        shape = (count, rows, length)
        return list(torch.randint(self.model.config.vocab_size, shape, generator=generator).to(self.device))
