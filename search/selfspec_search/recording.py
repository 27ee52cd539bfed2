"""Recording: the target's keys and values for a batch of texts, kept once for all trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from selfspec.attention import AttentionArgs
from selfspec.views import ProbePass, run_view
from selfspec_search.texts import Text


@dataclass
class RecordingPass(ProbePass):
    """Attends causally, as the probe does, and keeps what every layer would have cached."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
        self.layers[int(layer.layer_idx)] = (key.contiguous(), value.contiguous())  # type: ignore[arg-type]
        return super().attend(layer, query, key, value, how)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """A batch of texts, padded on the right to `s` tokens, and the target's keys and values of each layer.

    What stands behind a text's own end is computed from padding, finite, and never looked at.
    """

    indices: Tensor  # b, where each text stands in the list that the replay was given
    tokens: Tensor  # b s
    prompts: Tensor  # b
    written: Tensor  # b
    allowed: Tensor  # b
    layers: dict[int, tuple[Tensor, Tensor]]  # b h s d each

    @classmethod
    @torch.inference_mode()
    def of(cls, target: PreTrainedModel, texts: Sequence[Text], indices: Sequence[int]) -> Recording:
        """Run the target view once over `texts`, all positions in parallel."""
        device = target.device
        tokens = pad_sequence([text.tokens.to(device) for text in texts], batch_first=True)  # b s
        positions = repeat(torch.arange(tokens.shape[1], device=device), "s -> b s", b=tokens.shape[0])
        recorded = RecordingPass()
        run_view(target, tokens, positions, recorded, head=False)
        return cls(
            indices=torch.tensor(indices, device=device),
            tokens=tokens,
            prompts=torch.tensor([text.prompt for text in texts], device=device),
            written=torch.tensor([text.written for text in texts], device=device),
            allowed=torch.tensor([text.allowed for text in texts], device=device),
            layers=recorded.layers,
        )
