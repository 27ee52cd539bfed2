"""Recording: the target's keys and values for a few texts, computed once for all trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, PreTrainedModel

from selfspec.models.attention_hook import AttentionArgs
from selfspec.models.probe import ProbePass
from selfspec.models.views import run_view
from selfspec_search.replay.processing import process_packed
from selfspec_search.replay.texts import Text

TEXTS_TOGETHER = 8
"""Texts: the most in one recording. Texts of similar length share a recording, which limits padding."""
RECORDED_TOKENS = 2**14
"""Tokens: the most in one recording pass, padding included."""
MOST_PADDING = 2
"""Factor: the most by which padding may enlarge a batch."""


def batches(texts: Sequence[Text]) -> list[list[int]]:
    """Indices of texts in batches of similar length, within the limits on texts, tokens and padding."""
    found: list[list[int]] = []
    for index in sorted(range(len(texts)), key=lambda index: len(texts[index])):
        if not found or _is_full(found[-1], index, texts):
            found.append([])
        found[-1].append(index)
    return found


def _is_full(batch: Sequence[int], index: int, texts: Sequence[Text]) -> bool:
    padded = (len(batch) + 1) * len(texts[index])
    bare = sum(len(texts[other]) for other in (*batch, index))
    return len(batch) == TEXTS_TOGETHER or padded > min(RECORDED_TOKENS, MOST_PADDING * bare)


@dataclass
class RecordingPass(ProbePass):
    """A causal pass like the probe that also records the keys and values of every layer."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
        self.layers[int(layer.layer_idx)] = (key.contiguous(), value.contiguous())  # type: ignore[arg-type]
        return super().attend(layer, query, key, value, how)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """Texts of similar length, padded on the right to `s` tokens, and the target's keys and values of each layer.

    Keys and values after a text's end come from padding. They are finite, and masks hide them.
    """

    texts: Sequence[Text]
    indices: Sequence[int]  # of the texts in the replay's list
    tokens: Tensor  # b s
    layers: dict[int, tuple[Tensor, Tensor]]  # b h s d each

    @classmethod
    @torch.inference_mode()
    def of(cls, target: PreTrainedModel, texts: Sequence[Text], indices: Sequence[int]) -> Recording:
        """Run the target view once over `texts`, all positions in parallel."""
        tokens, positions = _padded(target, texts)
        recorded = RecordingPass()
        run_view(target, tokens, positions, recorded, head=False)
        return cls(texts=texts, indices=indices, tokens=tokens, layers=recorded.layers)


@torch.inference_mode()
def probabilities(target: PreTrainedModel, text: Text, processors: LogitsProcessorList, most: int) -> Tensor:
    """The target's probability p of each written token of a text, after logits processors: `written`.

    At most `most` positions' logits are in memory at once. A longer text takes several passes.
    """
    tokens, positions = _padded(target, [text])

    def piece(start: int, stop: int) -> Tensor:
        lengths = torch.arange(start, stop, device=tokens.device)
        body = {"input_ids": tokens[:, : stop - 1], "position_ids": positions[:, : stop - 1]}
        # The model's own forward applies the head, which may scale or cap logits, to the last positions only.
        output = target(**body, use_cache=False, selfspec_pass=ProbePass(), logits_to_keep=stop - start)
        scores = process_packed(processors, output.logits[0], tokens[0], torch.zeros_like(lengths), lengths)
        return torch.softmax(scores, dim=-1).gather(1, tokens[0, lengths, None])[:, 0]

    ends = [*range(text.prompt, len(text), most), len(text)]
    return torch.cat([piece(*ends_of_piece) for ends_of_piece in pairwise(ends)])


def _padded(target: PreTrainedModel, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Tokens and positions, `b s` each."""
    tokens = pad_sequence([text.tokens.to(target.device) for text in texts], batch_first=True)
    return tokens, repeat(torch.arange(tokens.shape[1], device=tokens.device), "s -> b s", b=tokens.shape[0])
