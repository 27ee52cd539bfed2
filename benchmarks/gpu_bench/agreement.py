"""Agreement, set: a draft of random weights is right as often as we like if what it skips does little.

The output projections of the skipped sub-layers are scaled in the target. At 0 the draft is the target; the larger the
scale, the more the target does that the draft leaves out. The time of a pass does not depend on what the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gpu_bench.shapes import draw
from selfspec import SelfSpeculator, SkipSet

ATTENTION_SHARE, MLP_SHARE = 0.6, 0.3
"""Of their layers: 45 % of the sub-layers, more attention than MLP, as in published skip sets (Draft & Verify's leave
out 60 % and 25 % of a 13B model's, 59 % and 46 % of a 70B model's)."""
PROJECTIONS = {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}
FIRST_GUESS = 0.03


def published_share(num_layers: int) -> SkipSet:
    """So many attention and MLP sub-layers, spread evenly over all layers but the first and the last."""
    return SkipSet(
        attn=_spread(num_layers, round(ATTENTION_SHARE * num_layers)),
        mlp=_spread(num_layers, round(MLP_SHARE * num_layers)),
    )


def _spread(num_layers: int, n: int) -> list[int]:
    return [1 + i * (num_layers - 2) // n for i in range(n)]


class Dial:
    """Scales what the sub-layers of a skip set give to the target; everything else is as it was drawn.

    A scale is set by drawing the projections anew, so no copy of them is kept and nothing is rounded twice.
    """

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model, self.seed = model, seed
        self._turned = SkipSet()

    @torch.no_grad()
    def turn(self, skip_set: SkipSet, scale: float) -> None:
        """Set the scale of `skip_set`, and of nothing else."""
        for kind, layer in {*self._turned, *skip_set}:
            name = f"model.layers.{layer}.{PROJECTIONS[kind]}.weight"
            weight = self.model.get_parameter(name)
            draw(name, weight, self.seed)
            if (kind, layer) in {*skip_set}:
                weight.mul_(scale)
        self._turned = skip_set


def find_scale(
    agreement_at: Callable[[float], float], wanted: float, *, guess: float, tolerance: float, steps: int
) -> tuple[float, float]:
    """The scale in (0, 1] whose agreement comes nearest to `wanted`, and that agreement.

    Disagreement grows about in proportion to the scale, which tells the next one to try; bisection takes over where
    that would leave the bracket. Ends within `tolerance`, or after `steps` tries.
    """
    low, high, scale, tried = 0.0, 1.0, guess, list[tuple[float, float]]()
    for _ in range(steps):
        agreement = agreement_at(scale)
        tried.append((scale, agreement))
        if abs(agreement - wanted) <= tolerance:
            break
        low, high = (scale, high) if agreement > wanted else (low, scale)
        proportional = scale * (1 - wanted) / max(1 - agreement, 1e-3)
        scale = proportional if low < proportional < high else (low + high) / 2
    return min(tried, key=lambda pair: abs(pair[1] - wanted))


def drafted_agreement(spec: SelfSpeculator, batches: Sequence[Tensor], new_tokens: int) -> float:
    """The share accepted of tokens drafted behind an accepted prefix, all depths together, by real decoding."""
    accepted = reached = 0
    for prompts in batches:
        write(spec, prompts, new_tokens)
        accepted += sum(spec.stats.accepted_at)
        reached += sum(spec.stats.reached_at)
    return accepted / reached if reached else 0.0


def write(spec: SelfSpeculator, prompts: Tensor, new_tokens: int) -> Tensor:
    """Decode greedily; the new tokens `b n`."""
    result = spec.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=False)
    assert isinstance(result, Tensor), "no output object was asked for"
    return result[:, prompts.shape[1] :]
