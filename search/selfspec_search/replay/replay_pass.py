"""ReplayPass: one pass of the draft over one token of every start that is alive, in all texts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from selfspec.models.attention_hook import AttentionArgs
from selfspec_search.replay.recording import MOST_PADDING, Recording

_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""PyTorch's fused CPU attention, which also returns the log-sum-exp of the scores; None if unavailable."""


@dataclass
class Starts:
    """The `a` starts whose drafts may have been accepted so far, and the draft's keys and values of these rounds.

    A start is the number of tokens written when a round begins. Starts are ordered by recording, text and start.
    """

    recordings: Tensor  # a
    rows: Tensor  # a, row of the recording
    texts: Tensor  # a, index of the text
    starts: Tensor  # a
    begins: Tensor  # a, where the text begins among the tokens of all texts
    last: Tensor  # a, position of the last committed token
    draftable: Tensor  # a, how many drafted tokens lie in the text; the last one allowed is never drafted
    chance: Tensor  # a, probability that a round which begins here accepts all tokens so far
    own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by layer: a h k d each, k depths

    @classmethod
    def of(cls, recordings: Sequence[Recording], begins: Sequence[int]) -> Starts:
        """Every start at which a round may draft; `begins` holds the place of each text's first token."""
        lines: list[tuple[int, ...]] = []
        for place, recording in enumerate(recordings):
            for row, (index, text) in enumerate(zip(recording.indices, recording.texts, strict=True)):
                end = min(text.written, text.allowed - 1)
                lines += [
                    (place, row, index, start, begins[index], text.prompt - 1 + start, end - start)
                    for start in range(end)
                ]
        device = recordings[0].tokens.device
        columns = torch.tensor(lines, dtype=torch.long, device=device).reshape(-1, len(_COLUMNS) - 1).unbind(dim=1)
        named: dict[str, Any] = dict(zip(_COLUMNS, columns, strict=False))
        return cls(**named, chance=torch.ones(len(lines), device=device))

    def only(self, index: Tensor) -> Starts:
        """The starts at these places, with the draft's keys and values of these starts."""
        if len(index) == len(self):
            return self
        own = {layer: (keys[index], values[index]) for layer, (keys, values) in self.own.items()}
        return Starts(**{name: getattr(self, name)[index] for name in _COLUMNS}, own=own)

    def __len__(self) -> int:
        return len(self.rows)


_COLUMNS = ("recordings", "rows", "texts", "starts", "begins", "last", "draftable", "chance")


class Layout:
    """Lays out packed starts as `b s`: a row for each text, padded to the largest number of starts.

    Only attention to the recorded keys needs the starts of a text in one row. Everywhere else, starts are packed.
    `texts` is the slice of the recording's rows.
    """

    def __init__(self, recording: Recording, texts: slice, rows: Tensor, last: Tensor, depth: int) -> None:
        self.recording, self.texts, self.last, self.depth = recording, texts, last, depth
        self.b = texts.stop - texts.start
        rows = rows - texts.start
        counts = torch.bincount(rows, minlength=self.b)  # b
        width = int(counts.max())
        rank = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        self.places = rows * width + rank  # a, the place of each start in the layout
        self.sources = torch.zeros(len(counts) * width, dtype=torch.long, device=rows.device)
        self.sources[self.places] = torch.arange(len(rows), device=rows.device)  # b*s, the start at each place
        self.recorded = max(1, int(last.max()))  # keys from the last committed token on are the draft's own
        self._masks: dict[tuple[int | None, int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, how: AttentionArgs) -> tuple[Tensor, Tensor]:
        """Attention of queries `a h g d` to the recorded keys before their rounds, and its log-sum-exp `a h g 1`."""
        groups = query.shape[2]
        keys, values = (x[self.texts, :, : self.recorded] for x in self.recording.layers[layer])  # b h n d
        mask, blind = self._mask(how.window, groups, query.dtype)
        laid_out = rearrange(query[self.sources], "(b s) h g d -> b h (s g) d", b=self.b)
        attended, weight = _attend(laid_out, keys, values, mask, how)
        packed, logsumexp = (
            rearrange(x, "b h (s g) d -> (b s) h g d", g=groups)[self.places] for x in (attended, weight[..., None])
        )
        return packed, logsumexp.masked_fill(blind[:, None, None, None], float("-inf"))

    def _mask(self, window: int | None, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two masks: the additive one, `b 1 (s g) n`, and the starts that see no recorded token, `a`.

        A start sees the recorded tokens before its round and within the window.
        """
        key = (window, groups, dtype)
        if key not in self._masks:
            slots = torch.arange(self.recorded, device=self.last.device)
            visible = slots < self.last[:, None]  # a n
            if window is not None:
                visible &= slots > (self.last + self.depth)[:, None] - window
            mask = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))
            laid_out = rearrange(mask[self.sources], "(b s) n -> b s n", b=self.b)
            self._masks[key] = (laid_out.repeat_interleave(groups, dim=1)[:, None], ~visible.any(dim=1))
        return self._masks[key]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, how: AttentionArgs) -> tuple[Tensor, Tensor]:
    """Attention `b h t d` with an additive mask, and the log-sum-exp of its scores `b h t`, float32."""
    if _FLASH is not None and query.device.type == "cpu" and how.softcap is None and key.shape[-1] == value.shape[-1]:
        attended, logsumexp = _FLASH(query, key, value, 0.0, False, attn_mask=mask, scale=how.scale)
        return attended, logsumexp
    scores = (query.float() * how.scale) @ key.float().transpose(-1, -2)
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    scores += mask
    largest = scores.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(scores.dtype).min)  # if every key is masked
    total = scores.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    attended = (scores.to(value.dtype) @ value) / total.clamp_min(torch.finfo(total.dtype).tiny).to(value.dtype)
    return attended, (total.log() + largest)[..., 0]


@dataclass
class Step:
    """Positions and layouts of one depth. They do not depend on the draft spec, so depth 0 is built once."""

    positions: Tensor  # a
    layouts: list[tuple[slice, Layout]]

    @classmethod
    def of(cls, recordings: Sequence[Recording], starts: Starts, depth: int) -> Step:
        rows = max(len(recording.texts) for recording in recordings)
        counts = torch.bincount(starts.recordings * rows + starts.rows, minlength=len(recordings) * rows)
        layouts, end = [], 0
        for recording, in_rows in zip(recordings, counts.reshape(-1, rows).tolist(), strict=True):
            for texts in _side_by_side(in_rows):
                span = slice(end, end := end + sum(in_rows[texts]))
                layouts.append((span, Layout(recording, texts, starts.rows[span], starts.last[span], depth)))
        return cls(starts.last + depth, layouts)


def _side_by_side(counts: Sequence[int]) -> list[slice]:
    """The rows that hold starts (`counts` in each), in as few groups as `MOST_PADDING` allows."""
    groups: list[slice] = []
    for row, count in enumerate(counts):
        first = groups[-1].start if groups else row
        together = counts[first : row + 1]
        if groups and len(together) * max(together) <= MOST_PADDING * sum(together):
            groups[-1] = slice(first, row + 1) if count else groups[-1]
        elif count:
            groups.append(slice(row, row + 1))
    return groups


class ReplayPass:
    """One pass of the draft over one token of each start, all in one row `1 a`.

    The token at position t = last + depth attends to the target's recorded keys before `last`, which the cache holds
    when the round begins, and to the draft's own keys of depths 0..depth.
    """

    def __init__(self, step: Step, own: dict[int, tuple[Tensor, Tensor]], depth: int) -> None:
        self.step, self.own, self.depth = step, own, depth

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
        index = int(layer.layer_idx)  # type: ignore[arg-type]
        query = rearrange(query, "1 (h g) a d -> a h g d", h=key.shape[1])
        own_keys, own_values = self._append(index, key, value)  # a h k d
        # Scores are float32 in every dtype, as in the attention kernels of the runtime.
        to_own = (query.float()[:, :, :, None] * how.scale * own_keys.float()[:, :, None]).sum(-1)  # a h g k
        if how.softcap is not None:
            to_own = torch.tanh(to_own / how.softcap) * how.softcap
        if how.window is not None and how.window <= self.depth:
            to_own[..., : self.depth + 1 - how.window] = float("-inf")
        pieces = [layout.attend(index, query[span], how) for span, layout in self.step.layouts]
        recorded, logsumexp = (torch.cat(parts) for parts in zip(*pieces, strict=True))  # a h g d, a h g 1
        # One softmax over recorded and own keys. The largest score is finite, since every token sees itself.
        largest = torch.maximum(to_own.amax(dim=-1, keepdim=True), logsumexp)
        of_recorded, of_own = torch.exp(logsumexp - largest), to_own.sub_(largest).exp_()
        from_own = (of_own[..., None] * own_values[:, :, None]).sum(-2)  # a h g d
        attended = (recorded * of_recorded + from_own) / (of_recorded + of_own.sum(dim=-1, keepdim=True))
        return rearrange(attended.to(value.dtype), "a h g d -> 1 a (h g) d")

    def _append(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        new = tuple(rearrange(x, "1 h a d -> a h 1 d") for x in (key, value))
        if old := self.own.get(index):
            new = tuple(torch.cat(pair, dim=-2) for pair in zip(old, new, strict=True))
        self.own[index] = (new[0], new[1])
        return self.own[index]
