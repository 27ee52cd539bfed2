"""Subject: a built shape, with the prompts and decoders that its measurements share."""

from __future__ import annotations

import torch
from common.budget import free_memory
from torch import Tensor, nn

from selfspec import Plan, SelfSpeculator, SkipSet, wrap
from shapes.agreement import PROJECTIONS, published_share
from shapes.shape import Shape, draw

DAMPING = 0.5
"""Scale of the sub-layers' outputs, times the root of the number of layers."""
HEAD_SPREAD = 0.5
"""Standard deviation of the logarithm of the lengths of the head's rows."""


class Subject:
    """A model with random weights, which can be drawn again at any time.

    Args:
        damped: draw weights for quantised drafts. Undamped, errors grow a hundredfold from the first layer to the last,
            and rounding to bfloat16 alone flips one token in twenty, so no quantised draft could agree. Damped,
            sub-layers add little, and the head's rows differ in length, so that the likeliest token stands out, as in
            trained models. Damping does not change the time of a pass.

    Attributes:
        moved: names of parameters that differ from their drawn values.
        scales: the nearest scale so far, by skip set and wanted agreement: the next cell begins there.
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
        """A new tensor with the drawn values of a parameter."""
        return self.draw(name, torch.empty_like(self.model.get_parameter(name), requires_grad=False))

    def draw(self, name: str, weight: Tensor) -> Tensor:
        """Fill a tensor with the drawn values of a parameter."""
        draw(name, weight, self.seed)
        self._damp(name, weight)
        return weight

    def restore(self) -> None:
        """Restore the drawn values of all parameters in place."""
        for name in self.moved:
            self.draw(name, self.model.get_parameter(name))
        self.moved.clear()

    def linears(self) -> dict[str, nn.Linear]:
        """All linear layers and the head, by the names of their weights."""
        modules = self.model.named_modules()
        return {f"{name}.weight": module for name, module in modules if type(module) is nn.Linear}

    def prompts(self, count: int, rows: int, length: int, *, seed: int = 1) -> list[Tensor]:
        """`count` batches of random tokens, `rows length` each, without the padding token, which Hugging Face masks."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        drawn = torch.randint(1, self.model.config.vocab_size, (count, rows, length), generator=generator)
        return list(drawn.to(self.device))

    def plain(self) -> SelfSpeculator:
        """Plain decoding in our runtime."""
        return self.drafting(SkipSet(), 0)

    def drafting(self, skip_set: SkipSet, gamma: int) -> SelfSpeculator:
        """Our decoder with drafts of `gamma` tokens without `skip_set`; kept, since each compiles its own passes."""
        key = (skip_set, gamma)
        if key not in self._specs:  # fixed, since the ideal speedup assumes this draft length in every round
            self._specs[key] = wrap(self.model, Plan(skip_set=skip_set, gamma=gamma), policy="fixed")
        return self._specs[key]

    def forget(self) -> None:
        """Free all decoders and their caches."""
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
    """Builds one shape at a time; the shape before is freed first."""

    def __init__(self, device: torch.device, seed: int, *, damped: bool = False) -> None:
        self.device, self.seed, self.damped = device, seed, damped
        self._latest: Subject | None = None

    def of(self, shape: Shape) -> Subject:
        if self._latest is None or self._latest.shape is not shape:
            self._latest = None
            free_memory()
            self._latest = Subject(shape, self.device, self.seed, damped=self.damped)
        return self._latest
