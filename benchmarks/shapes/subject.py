"""Subject: one shape, built, and everything that all measurements of it share."""

from __future__ import annotations

import torch
from common.budget import free_memory
from torch import Tensor, nn

from selfspec import Plan, SelfSpeculator, SkipSet, wrap
from shapes.agreement import PROJECTIONS, published_share
from shapes.shape import Shape, draw

DAMPING = 0.5
"""What sub-layers add is scaled by this over the root of the layers, so that all together add as much in any model."""
HEAD_SPREAD = 0.5
"""Standard deviation of the logarithm of the head's row lengths."""


class Subject:
    """A model with random weights, which can be drawn again at any time: they depend on the seed alone.

    Args:
        damped: draw weights so that rounding them does not change everything. As shapes draw them, errors grow a
            hundredfold from the first layer to the last, and the two likeliest tokens are so near to each other that
            rounding to bfloat16 alone flips one in twenty: no quantised draft could agree with that. Damped, what the
            sub-layers add is small, and the head's rows differ in length, so that the likeliest token stands out, as
            in trained models. Neither changes how long a pass takes.

    Attributes:
        moved: names of parameters that are not as they were drawn.
        scales: by skip set and agreement wanted, the scale that came nearest so far: where the next cell begins.
    """

    def __init__(self, shape: Shape, device: torch.device, seed: int, *, damped: bool = False) -> None:
        self.shape, self.device, self.seed, self.damped = shape, device, seed, damped
        self.model = shape.build(device, seed)
        self.num_layers: int = self.model.config.num_hidden_layers
        self.skip_set = published_share(self.num_layers)
        self.moved: set[str] = set()
        self.scales: dict[tuple[SkipSet, float], float] = {}
        self._specs: dict[tuple[SkipSet, int], SelfSpeculator] = {}
        for name, parameter in self.model.named_parameters():
            self._damp(name, parameter)

    def drawn(self, name: str) -> Tensor:
        """A parameter as it was drawn, in a tensor of its own."""
        return self.draw(name, torch.empty_like(self.model.get_parameter(name), requires_grad=False))

    def draw(self, name: str, weight: Tensor) -> Tensor:
        """Fill a tensor with the parameter as it was drawn."""
        draw(name, weight, self.seed)
        self._damp(name, weight)
        return weight

    def restore(self) -> None:
        """Leave all parameters as they were drawn, where they are."""
        for name in self.moved:
            self.draw(name, self.model.get_parameter(name))
        self.moved.clear()

    def linears(self) -> dict[str, nn.Linear]:
        """All linear layers, the head's too, by their weights' names."""
        modules = self.model.named_modules()
        return {f"{name}.weight": module for name, module in modules if type(module) is nn.Linear}

    def prompts(self, count: int, rows: int, length: int, *, seed: int = 1) -> list[Tensor]:
        """So many batches of random tokens, each `rows length`; none is the padding token, which Hugging Face hides."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        drawn = torch.randint(1, self.model.config.vocab_size, (count, rows, length), generator=generator)
        return list(drawn.to(self.device))

    def plain(self) -> SelfSpeculator:
        """The model in our runtime, without a draft."""
        return self.drafting(SkipSet(), 0)

    def drafting(self, skip_set: SkipSet, gamma: int) -> SelfSpeculator:
        """Ours, with drafts of `gamma` tokens without `skip_set`; each is kept, since it compiles its own passes."""
        key = (skip_set, gamma)
        if key not in self._specs:  # fixed: the ideal speedup is that of this draft length in every round
            self._specs[key] = wrap(self.model, Plan(skip_set=skip_set, gamma=gamma), policy="fixed")
        return self._specs[key]

    def forget(self) -> None:
        """Free the caches of all that decoded so far."""
        self._specs.clear()
        free_memory()

    @torch.no_grad()
    def _damp(self, name: str, weight: Tensor) -> None:
        if not self.damped:
            return
        if any(projection in name for projection in PROJECTIONS.values()) and weight.ndim == 2:
            weight.mul_(DAMPING * self.num_layers**-0.5)
        elif "lm_head" in name:
            generator = torch.Generator(weight.device).manual_seed(self.seed)
            logarithms = torch.randn(weight.shape[0], 1, generator=generator, device=weight.device)
            weight.mul_((HEAD_SPREAD * logarithms).exp().to(weight.dtype))


class Subjects:
    """Builds shapes one at a time: the one before makes room first."""

    def __init__(self, device: torch.device, seed: int, *, damped: bool = False) -> None:
        self.device, self.seed, self.damped = device, seed, damped
        self._latest: Subject | None = None

    def of(self, shape: Shape) -> Subject:
        if self._latest is None or self._latest.shape is not shape:
            self._latest = None
            free_memory()
            self._latest = Subject(shape, self.device, self.seed, damped=self.damped)
        return self._latest
