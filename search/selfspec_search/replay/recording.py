"""Recording: the target's keys and values for a few texts, kept once for all trials."""

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
from selfspec.models.support import ProbePass
from selfspec.models.views import run_view
from selfspec_search.replay.processing import process_packed
from selfspec_search.replay.texts import Text

TEXTS_TOGETHER = 8
"""Texts of like length share a recording: attention then looks at little padding."""
RECORDED_TOKENS = 2**14
"""The most tokens recorded in one pass."""
PADDING = 2
"""Padding makes no batch more than this many times as large."""


def batches(texts: Sequence[Text]) -> list[list[int]]:
    """Indices of texts, by length, in batches of few texts, few tokens and little padding."""
    found: list[list[int]] = []
    for index in sorted(range(len(texts)), key=lambda index: len(texts[index])):
        if not found or _is_full(found[-1], index, texts):
            found.append([])
        found[-1].append(index)
    return found


def _is_full(batch: Sequence[int], index: int, texts: Sequence[Text]) -> bool:
    padded = (len(batch) + 1) * len(texts[index])
    bare = sum(len(texts[other]) for other in (*batch, index))
    return len(batch) == TEXTS_TOGETHER or padded > min(RECORDED_TOKENS, PADDING * bare)


@dataclass
class RecordingPass(ProbePass):
    """Attends causally, as the probe does, and keeps what every layer would have cached."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
        self.layers[int(layer.layer_idx)] = (key.contiguous(), value.contiguous())  # type: ignore[arg-type]
        return super().attend(layer, query, key, value, how)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """Texts of like length, padded on the right to `s` tokens, and the target's keys and values of each layer.

    What stands behind a text's own end is computed from padding, finite, and never looked at.
    """

    texts: Sequence[Text]
    indices: Sequence[int]  # where each text stands in the list that the replay was given
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
    """The processed target's probability p of each written token of a text, as it was drawn: `written`.

    No more than `most` positions' logits are held at once; where a text has more, it is run again up to the next ones.
    """
    ends = [*range(text.prompt, len(text), most), len(text)]
    tokens, positions = _padded(target, [text])
    return torch.cat([_piece(target, tokens, positions, range(*piece), processors) for piece in pairwise(ends)])


def _piece(
    target: PreTrainedModel, tokens: Tensor, positions: Tensor, piece: range, processors: LogitsProcessorList
) -> Tensor:
    lengths = torch.arange(piece.start, piece.stop, device=tokens.device)
    body = {"input_ids": tokens[:, : piece.stop - 1], "position_ids": positions[:, : piece.stop - 1]}
    # The family's own head, which may scale or cap, over the last positions alone.
    output = target(**body, use_cache=False, selfspec_pass=ProbePass(), logits_to_keep=len(piece))
    scores = process_packed(processors, output.logits[0], tokens[0], torch.zeros_like(lengths), lengths)
    return torch.softmax(scores, dim=-1).gather(1, tokens[0, lengths, None])[:, 0]


def _padded(target: PreTrainedModel, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Tokens and positions, `b s` each."""
    tokens = pad_sequence([text.tokens.to(target.device) for text in texts], batch_first=True)
    return tokens, repeat(torch.arange(tokens.shape[1], device=tokens.device), "s -> b s", b=tokens.shape[0])
