"""Recipes: everything that distinguishes one training from another."""

import math
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training at one row length; `share` is its share of the steps."""

    share: float
    rows: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one training. Without `dropout` and `exit_weights` it is the plain twin."""

    name: str
    dropout: float = 0.0  # probability of dropping the last layer's sub-layers, at the end of the ramp
    exit_weights: tuple[tuple[float, float], ...] = ()  # (from this share of the steps on, weight of its loss)
    exit_layers: tuple[int, ...] = (2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6, 6, 7, 8, 10, 12)  # drawn uniformly
    steps: int = 3000
    warmup: float = 1 / 30  # share of the steps in which the rates rise
    ramp: float = 8 / 15  # share of the steps over which dropout and self-distillation come in
    rate_after_ramp: float = 8 / 13  # the rates' factor at the end of the ramp; from there it falls faster
    muon_rate: float = 0.02
    adam_rate: float = 0.004
    weight_decay: float = 0.01
    seed: int = 20240416
    phases: tuple[Phase, ...] = (
        Phase(share=0.72, rows=8, length=256),
        Phase(share=0.10, rows=4, length=512),
        Phase(share=0.18, rows=2, length=1024),
    )

    def phase(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        end = 0.0
        for phase in self.phases:
            end += phase.share
            if step < round(end * self.steps):
                return phase
        return self.phases[-1]

    def rate(self, step: int) -> float:
        """The learning rates' factor: linear warmup, then two linear decays, the second to almost zero."""
        warmup, turn = self.warmup * self.steps, self.ramp * self.steps
        decay = float(np.interp(step, (warmup, turn, self.steps), (1.0, self.rate_after_ramp, 0.0)))
        return min((step + 1) / warmup, decay)

    def progress(self, step: int) -> float:
        """From 0 to 1 over the ramp."""
        return min(1.0, step / (self.ramp * self.steps))

    def dropped(self, step: int, layers: int) -> frozenset[tuple[str, int]]:
        """The sub-layers left out in a step; the probability rises exponentially with depth (LayerSkip, eq. 1)."""
        draws = np.random.default_rng([self.seed, step]).random((layers, 2))
        top = self.dropout * self.progress(step)
        chance = [top * (math.exp(i * math.log(2) / (layers - 1)) - 1) for i in range(layers)]
        kinds = ("attn", "mlp")
        return frozenset((kinds[k], i) for i in range(layers) for k in range(2) if draws[i, k] < chance[i])

    def early_weight(self, step: int) -> float:
        """The weight of the early-exit loss in a step."""
        reached = [weight for start, weight in self.exit_weights if step >= round(start * self.steps)]
        return reached[-1] if reached else 0.0

    def exit_layer(self, step: int) -> int | None:
        """After how many layers this step takes its early exit; None if the recipe has none."""
        if not self.early_weight(step):
            return None
        return int(np.random.default_rng([self.seed, step, 1]).choice(self.exit_layers))


PLAIN = Recipe(name="plain")
LAYERSKIP = replace(PLAIN, name="layerskip", dropout=0.2, exit_weights=((0.0, 0.5), (8 / 15, 1.0), (0.82, 2.5)))
RECIPES = {recipe.name: recipe for recipe in (LAYERSKIP, PLAIN)}
