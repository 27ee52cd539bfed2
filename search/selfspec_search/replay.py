"""Replay: what a draft would have got accepted, computed in parallel from text that the target wrote.

A round starts at some token of the text, and a token drafted at depth d only matters if the d tokens before it in the
round were accepted, that is, equal to the text's own. So depth d is one pass of the draft over *all* starts whose first
d tokens agreed: the token at position t = start + d attends to the target's recorded keys for j < start, which is what
the cache holds when the round begins, and to the draft's own keys of depths 0..d, which is what the draft wrote since.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfspec.attention import AttentionArgs
from selfspec.errors import InputError
from selfspec.skip_set import SkipSet
from selfspec.views import change_skip_set, draft_view, longrope_switch, pin_longrope, run_view, target_view
from selfspec_search.recording import Recording
from selfspec_search.table import Table
from selfspec_search.texts import Text

MOST_LOGITS = 2**26
"""The most logits in one pass: texts are replayed in batches that stay below it."""


@dataclass
class Alive:
    """The `a` starts of one recording whose draft agreed so far, and the draft's own keys and values since then."""

    rows: Tensor  # a, row of the recording
    starts: Tensor  # a, tokens written before the round begins
    own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by layer: a h 1 k d each, k depths

    @classmethod
    def every_start(cls, recording: Recording) -> Alive:
        starts = torch.arange(int(recording.written.max()), device=recording.tokens.device)
        rows, starts = torch.nonzero(starts < recording.written[:, None], as_tuple=True)
        return cls(rows, starts).only(_draftable(recording, rows, starts) > 0)

    def only(self, keep: Tensor) -> Alive:
        """The starts where `keep` (`a`) holds."""
        if bool(keep.all()):
            return self
        index = keep.nonzero()[:, 0]
        own = {layer: (keys[index], values[index]) for layer, (keys, values) in self.own.items()}
        return Alive(self.rows[index], self.starts[index], own)

    def __len__(self) -> int:
        return len(self.rows)


class ReplayPass:
    """One pass of the draft over one token of every start that is alive, all starts in one row `1 a`.

    Attention to the recorded keys needs the starts of one text side by side; everything else in the model does not.
    So the starts travel packed, and are laid out as `b s` (texts, and starts of each, padded) inside `attend` only.
    """

    def __init__(self, recording: Recording, alive: Alive, depth: int) -> None:
        self.recording, self.alive, self.depth = recording, alive, depth
        first = recording.prompts[alive.rows] - 1 + alive.starts  # a, the last committed token
        self.first, self.positions = first, first + depth
        counts = torch.bincount(alive.rows, minlength=len(recording.prompts))  # b
        rank = torch.arange(len(alive), device=first.device) - (counts.cumsum(0) - counts)[alive.rows]
        self.width = int(counts.max())
        self.places = alive.rows * self.width + rank  # a, where each start stands in the padded layout
        self.sources = torch.zeros(len(counts) * self.width, dtype=torch.long, device=first.device)
        self.sources[self.places] = torch.arange(len(alive), device=first.device)  # b*s, and back
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
        index = int(layer.layer_idx)  # type: ignore[arg-type]
        keys, values = self.recording.layers[index]  # b h n d
        own_keys, own_values = self._append(index, key, value)  # a h 1 k d
        query = rearrange(query, "1 (h g) a d -> a h g d", h=keys.shape[1]) * how.scale
        b, groups = keys.shape[0], query.shape[2]

        to_recorded = (self._lay_out(query, b) @ keys.transpose(-1, -2)).float()  # b h (s g) n
        to_own = (rearrange(query, "a h g d -> a h g 1 d") * own_keys).sum(-1).float()  # a h g k
        if how.softcap is not None:
            to_recorded, to_own = (torch.tanh(x / how.softcap) * how.softcap for x in (to_recorded, to_own))
        rearrange(to_recorded, "b h (s g) n -> b h s g n", g=groups).add_(self._mask(how.window))
        if how.window is not None and how.window <= self.depth:
            to_own[..., : self.depth + 1 - how.window] = float("-inf")

        # One softmax over both: in place and without joining them, since this is half of a trial's time. The largest
        # score is finite, whatever the masks hide, because every token sees itself.
        largest = torch.maximum(
            to_recorded.amax(dim=-1, keepdim=True), self._lay_out(to_own.amax(dim=-1, keepdim=True), b)
        )
        to_recorded.sub_(largest).exp_()
        to_own.sub_(self._pack(largest, groups)).exp_()
        total = self._pack(to_recorded.sum(dim=-1, keepdim=True), groups) + to_own.sum(dim=-1, keepdim=True)
        from_recorded = self._pack(to_recorded.to(values.dtype) @ values, groups)
        from_own = (rearrange(to_own, "a h g k -> a h g k 1") * own_values).sum(-2)
        attended = ((from_recorded + from_own) / total).to(values.dtype)
        return rearrange(attended, "a h g d -> 1 a (h g) d")

    def _append(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        new = tuple(rearrange(x, "1 h a d -> a h 1 1 d") for x in (key, value))
        if old := self.alive.own.get(index):
            new = tuple(torch.cat(pair, dim=-2) for pair in zip(old, new, strict=True))
        self.alive.own[index] = (new[0], new[1])
        return self.alive.own[index]

    def _lay_out(self, packed: Tensor, b: int) -> Tensor:
        return rearrange(packed[self.sources], "(b s) h g x -> b h (s g) x", b=b)

    def _pack(self, laid_out: Tensor, groups: int) -> Tensor:
        return rearrange(laid_out, "b h (s g) x -> (b s) h g x", g=groups)[self.places]

    def _mask(self, window: int | None) -> Tensor:
        """Additive, `b 1 s 1 n`: recorded tokens before the round's start, and within the window."""
        if window not in self._masks:
            b, n = self.recording.tokens.shape
            slots = torch.arange(n, device=self.first.device)
            visible = slots < self.first[:, None]  # a n
            if window is not None:
                visible &= slots > self.positions[:, None] - window
            mask = torch.zeros_like(visible, dtype=torch.float32).masked_fill_(~visible, float("-inf"))
            self._masks[window] = rearrange(mask[self.sources], "(b s) n -> b 1 s 1 n", b=b)
        return self._masks[window]


class Replay:
    """Replays drafts of one model on texts that it wrote. One draft view and one recording serve every skip set.

    Args:
        model: the model that wrote the texts.
        texts: as `write_texts` yields them, in any order.
        depths: the most tokens that a round may draft (gamma_max).

    Raises:
        InputError: texts on both sides of a longrope switch, which no one pass can serve.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[Text], depths: int) -> None:
        self.model, self.texts, self.depths = model, texts, depths
        self.view = draft_view(model, SkipSet())
        target = target_view(model)
        _pin_longrope(model, texts, (self.view, target), depths)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self.recordings = [
            Recording.of(target, [texts[index] for index in batch], batch)
            for batch in _batches(texts, MOST_LOGITS // vocabulary)
        ]

    @torch.inference_mode()
    def run(self, skip_set: SkipSet, how_deep: Callable[[Table], int] | None = None) -> Table | None:
        """The table for a draft without `skip_set`.

        `how_deep` sees an estimate from depth 0 alone (`Table.from_first_depth`), says how many depths are worth
        replaying, and may end the trial by 0: then None is returned.
        """
        change_skip_set(self.view, skip_set)
        table = Table.empty(self.texts, self.depths)
        alive = [Alive.every_start(recording) for recording in self.recordings]
        depths, depth = self.depths, 0
        while depth < depths:
            alive = [self._step(*pair, depth, table) for pair in zip(self.recordings, alive, strict=True)]
            if depth == 0 and how_deep is not None:
                depths = min(depths, how_deep(table.from_first_depth()))
            depth += 1
        return table.shallow(depths) if depths > 0 else None

    def first_depth(self, skip_set: SkipSet) -> Table:
        """The estimate from depth 0 alone."""
        seen: list[Table] = []

        def stop(first: Table) -> int:
            seen.append(first)
            return 0

        self.run(skip_set, stop)
        return seen[0]

    def only(self, indices: Sequence[int]) -> Replay:
        """A replay of some of the texts."""
        return Replay(self.model, [self.texts[index] for index in indices], self.depths)

    def _step(self, recording: Recording, alive: Alive, depth: int, table: Table) -> Alive:
        """Draft one token at `depth` for every start alive, note it in the table, and return those that agreed."""
        if len(alive) == 0:
            return alive
        step = ReplayPass(recording, alive, depth)
        tokens = recording.tokens[alive.rows, step.positions]
        logits = run_view(self.view, tokens[None], step.positions[None], step)[0].float()  # a v
        top, drafted = logits.max(dim=-1)
        agreed = drafted == recording.tokens[alive.rows, step.positions + 1]
        confidence = torch.exp(top - torch.logsumexp(logits, dim=-1))
        table.note(recording.indices[alive.rows], alive.starts, depth, agreed, confidence)
        return alive.only(agreed & (_draftable(recording, alive.rows, alive.starts) > depth + 1))


def _draftable(recording: Recording, rows: Tensor, starts: Tensor) -> Tensor:
    """How many of a round's drafted tokens lie in the text, `a`: the last token allowed is never drafted."""
    return torch.minimum(recording.written[rows], recording.allowed[rows] - 1) - starts


def _batches(texts: Sequence[Text], most_starts: int) -> list[list[int]]:
    """Indices of texts, by length so that batches pad little, in batches of at most so many starts."""
    batches: list[list[int]] = []
    starts = 0
    for index in sorted(range(len(texts)), key=lambda index: len(texts[index])):
        starts += texts[index].written
        if not batches or starts > most_starts:
            batches.append([])
            starts = texts[index].written
        batches[-1].append(index)
    return batches


def _pin_longrope(
    model: PreTrainedModel, texts: Sequence[Text], views: tuple[PreTrainedModel, ...], depths: int
) -> None:
    switch = longrope_switch(model)
    if switch is None:
        return
    long = {text.prompt > switch for text in texts}
    if len(long) > 1 or any(text.prompt <= switch < text.prompt + text.allowed + depths + 1 for text in texts):
        raise InputError(
            f"this model's longrope switches at {switch} tokens; give prompts that stay, with what is written, "
            "on one side of it"
        )
    for view in views:
        pin_longrope(view, long=True in long)
