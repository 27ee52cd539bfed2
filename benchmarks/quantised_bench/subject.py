"""Subject: one shape, built with weights drawn so that rounding them does not change everything.

As `gpu_bench` draws them, errors grow a hundredfold from the first layer to the last, and the two likeliest tokens are
so near to each other that rounding to bfloat16 alone flips one in twenty: no draft could agree with that. Here what the
sub-layers add is damped, so that errors stay as small as they are, and the head's rows differ in length, so that the
likeliest token stands out, as in trained models. None of this changes how long a pass takes.
"""

from __future__ import annotations

import torch
from gpu_bench.agreement import PROJECTIONS, published_share
from gpu_bench.shapes import Shape, draw
from torch import Tensor, nn

DAMPING = 0.5
"""What sub-layers add is scaled by this over the root of the layers, so that all together add as much in any model."""
HEAD_SPREAD = 0.5
"""Standard deviation of the logarithm of the head's row lengths."""


class Subject:
    """A model with random weights, which can be drawn again at any time: they depend on the seed alone.

    Attributes:
        moved: names of parameters that are not as they were drawn.
    """

    def __init__(self, shape: Shape, device: torch.device, seed: int) -> None:
        self.shape, self.device, self.seed = shape, device, seed
        self.model = shape.build(device, seed)
        self.num_layers: int = self.model.config.num_hidden_layers
        self.skip_set = published_share(self.num_layers)
        self.moved: set[str] = set()
        for name, parameter in self.model.named_parameters():
            self._temper(name, parameter)

    def drawn(self, name: str) -> Tensor:
        """A parameter as it was at first, in a tensor of its own."""
        return self._draw(name, torch.empty_like(self.model.get_parameter(name), requires_grad=False))

    def restore(self) -> None:
        """Leave all parameters as they were drawn, where they are."""
        for name in self.moved:
            self._draw(name, self.model.get_parameter(name))
        self.moved.clear()

    def linears(self) -> dict[str, nn.Linear]:
        """All linear layers, the head's too, by their weights' names."""
        modules = self.model.named_modules()
        return {f"{name}.weight": module for name, module in modules if type(module) is nn.Linear}

    def prompts(self, count: int, length: int) -> list[Tensor]:
        """So many rows of random tokens; none is the padding token, which Hugging Face would hide."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        drawn = torch.randint(1, self.model.config.vocab_size, (count, length), generator=generator)
        return list(drawn.to(self.device))

    def _draw(self, name: str, weight: Tensor) -> Tensor:
        draw(name, weight, self.seed)
        self._temper(name, weight)
        return weight

    @torch.no_grad()
    def _temper(self, name: str, weight: Tensor) -> None:
        if any(projection in name for projection in PROJECTIONS.values()) and weight.ndim == 2:
            weight.mul_(DAMPING * self.num_layers**-0.5)
        elif "lm_head" in name:
            generator = torch.Generator(weight.device).manual_seed(self.seed)
            logarithms = torch.randn(weight.shape[0], 1, generator=generator, device=weight.device)
            weight.mul_((HEAD_SPREAD * logarithms).exp().to(weight.dtype))
