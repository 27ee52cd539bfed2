"""Request: the rows of one `generate`, their committed tokens, and where each row ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from selfspec.decoding.acceptance import Acceptance, Committed, Draft, in_first
from selfspec.decoding.logits_processors import rebind_pads, settings_of, uncaptured_reason
from selfspec.decoding.stopping import Stopping
from selfspec.errors import InputError
from selfspec.runtime.row_buffers import STOP_TOKENS, RowBuffers

MANY_TOKENS = 4096
"""New tokens of a row: a request that may write more takes memory as its text grows, not for all of it."""
FIRST_TOKENS = 64
"""New tokens of a row: the first room of a request that may write many."""
STATIC_TOKENS = 1024
"""New tokens of a row: the same where a larger cache drops captured rounds or compiled passes."""


@dataclass(kw_only=True)
class Request:
    """Rows in Hugging Face's layout: left-padded prompts, then committed tokens, then room for a draft.

    Attributes:
        prompts: `b P`, padded on the left.
        pads: `b`, how many tokens of padding each prompt has.
        max_length: where every row ends at the latest, padding included.
        room: how many tokens a round may write beyond `max_length` (gamma + 1).
        sampling: whether tokens are drawn; else decoding is greedy.
        processors, criteria: Hugging Face's logits processors, applied to p and q alike, and stopping criteria.
        pad_token: fills the result after rows that ended early.
        lockstep: why every round must commit one token in every row (`needs_lockstep`); empty if it need not. A
            finished row then commits padding, exactly as in `model.generate`.
        keep_scores, keep_logits: whether to keep the processed and the raw logits of committed tokens.
        scores, logits: the kept ones, `v`, by row and committed token.
        stopping: finds where rows end, on the host; its `stopped_at` is the request's.
        buffers: the rows' tensors on the device; the request shares `sequences`, `pads`, `ends` and others with them.
            They grow with the text.
        is_captured: whether captured work reads and writes `buffers`.
        known_ends: the host's copy of `ends`: committed tokens of each row, padding included.
    """

    prompts: Tensor
    pads: Tensor
    max_length: int
    room: int
    sampling: bool
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    pad_token: int
    lockstep: list[str] = field(default_factory=list)
    keep_scores: bool = False
    keep_logits: bool = False

    def __post_init__(self) -> None:
        self.scores: list[list[Tensor]] = [[] for _ in range(self.rows)]
        self.logits: list[list[Tensor]] = [[] for _ in range(self.rows)]
        self.stopping = Stopping(self.criteria, self.prompts, self.max_length, bool(self.lockstep))
        width, device = self.first_width(), self.prompts.device
        self.bind(RowBuffers(self.rows, width, device, len(self.stopping.tokens)), captured=False)

    def bind(self, buffers: RowBuffers, *, captured: bool) -> None:
        """Write the prompts into `buffers`; captured buffers outlive the request."""
        self.buffers, self.is_captured, width = buffers, captured, self.prompts.shape[1]
        buffers.pads.copy_(self.pads)
        self.pads, self.ends = buffers.pads, buffers.ends
        self.finished, self.found, self.matched = buffers.finished, buffers.found, buffers.matched
        self.processors = rebind_pads(self.processors, self.pads)
        self.sequences.zero_()  # token 0 is in every vocabulary; the padding token need not be
        self.sequences[:, :width] = self.prompts
        self.found.zero_()
        self.matched.zero_()
        buffers.stop_tokens.fill_(-1)
        for index, token in enumerate(sorted(self.stopping.tokens)):
            buffers.stop_tokens[index] = token
        self.rewind()

    def rewind(self) -> None:
        """Back to the prompts, with nothing committed."""
        width = self.prompts.shape[1]
        self.ends.fill_(width)
        self.finished.fill_(False)
        self.buffers.limit.fill_(self.max_length)
        self.known_ends = [width] * self.rows
        self.stopping.stopped_at = [None] * self.rows

    def uncaptured_reason(self) -> str | None:
        """Why the request's rounds cannot be captured; None if they can."""
        if self.lockstep:
            return "rows advance one token at a time"
        if (count := len(self.stopping.tokens)) > STOP_TOKENS:
            return f"there are {count} stop tokens, and captured rounds have room for {STOP_TOKENS}"
        return uncaptured_reason(self.processors)

    @property
    def capture_key(self) -> tuple[object, ...]:
        """The settings that a capture bakes in: equal for requests that can share captured rounds."""
        return (self.sampling, *map(settings_of, self.processors))

    @property
    def sequences(self) -> Tensor:
        """Prompts, committed tokens and room for a draft, `b w`."""
        return self.buffers.sequences

    def first_width(self, *, static: bool = False) -> int:
        """Columns to begin with: for all tokens that the request may write, or for a first part if these are many."""
        prompt = self.prompts.shape[1]
        allowed = self.max_length - prompt
        first = max(self.room, STATIC_TOKENS if static else FIRST_TOKENS)
        return prompt + (allowed if allowed <= MANY_TOKENS else min(allowed, first)) + self.room

    def wider(self) -> int:
        """Columns for twice as many new tokens as `reach`, up to the limit."""
        return min(2 * self.reach - self.prompts.shape[1], self.max_length + self.room)

    @property
    def reach(self) -> int:
        """Columns that the next round may write to; the round ends with a look, which may write another draft."""
        return min(max(self.known_ends) + 2 * self.room, self.max_length + self.room)

    @property
    def rows(self) -> int:
        return self.prompts.shape[0]

    @property
    def stopped_at(self) -> list[int | None]:
        """Where each row ended, padding included; None for unfinished rows."""
        return self.stopping.stopped_at

    @property
    def length(self) -> int:
        """The width of the result: where the last row stopped."""
        return max(end or 0 for end in self.stopped_at)

    def last_tokens(self) -> Tensor:
        """Each row's last committed token, `b`."""
        return self.sequences.gather(1, self.ends[:, None] - 1)[:, 0]

    def draft_limits(self, gamma: int) -> Tensor:
        """The most tokens worth drafting in each row, `b`: a round commits one token more than it accepts."""
        return (self.buffers.limit - self.ends - 1).clamp(0, gamma) * ~self.finished

    def longest_draft(self, gamma: int) -> int:
        """The largest of `draft_limits`, without a read of the device."""
        lefts = (self.max_length - self.known_ends[row] - 1 for row in self.unfinished())
        return min(gamma, max(lefts, default=0))

    def unfinished(self) -> list[int]:
        """The rows that have not stopped."""
        return [row for row, end in enumerate(self.stopped_at) if end is None]

    def has_ended(self, row: int) -> bool:
        """Whether the row commits no more tokens."""
        return self.stopped_at[row] is not None and not self.stopping.rows_run_on

    def is_done(self) -> bool:
        """Whether every row has stopped."""
        return not self.unfinished()

    def commit(self, draft: Draft, acceptance: Acceptance, scores: Tensor) -> Tensor:
        """Commit each unfinished row's accepted tokens and the token that follows them, up to where the row ends.

        `scores` are the target's processed logits `b n+1 v`. Works on the device alone; returns the values that
        `receive` takes on the host, `b m`.
        """
        new = torch.nn.functional.pad(draft.tokens, (0, 1))  # b n+1
        new.scatter_(1, acceptance.accepted[:, None], acceptance.following[:, None])
        steps, finished = torch.arange(new.shape[1], device=new.device), self.finished.clone()
        if self.lockstep:
            counts, new = torch.ones_like(self.ends), torch.where(finished[:, None], self.pad_token, new)
        else:
            counts = torch.minimum(acceptance.accepted + 1, self.buffers.limit - self.ends)
            stops = (new[..., None] == self.buffers.stop_tokens).any(dim=-1) & in_first(counts, new.shape[1])
            first = torch.where(stops, steps, new.shape[1]).amin(dim=1)
            counts = torch.minimum(counts, first + 1) * ~finished
            self.finished |= stops.any(dim=1) | (self.ends + counts >= self.buffers.limit)
        columns = (self.ends, counts, draft.lengths, acceptance.accepted, finished, self._unusable(scores, counts))
        host_values = torch.cat([torch.stack([column.long() for column in columns], dim=1), new], dim=1)
        self.sequences.scatter_(1, self.ends[:, None] + steps, new)
        self.ends += counts
        return host_values

    def receive(self, host_values: list[list[int]], scores: Tensor, logits: Tensor) -> list[Committed]:
        """On the host: the committed tokens of every unfinished row; notes the rows that end with these tokens.

        `host_values` are `commit`'s, read; `scores` and the raw `logits` are `b n+1 v`.

        Raises:
            InputError: the scores of a committed token hold NaN, or infinity where tokens are drawn.
        """
        committed = []
        for row, (start, count, drafted, accepted, finished, unusable, *tokens) in enumerate(host_values):
            if unusable and not finished:
                raise InputError(
                    f"the model's logits hold NaN or infinity in row {row} after {start} tokens; "
                    "check the weights and the logits processors, or use a wider dtype"
                )
            self.known_ends[row] = start + count
            if self.keep_scores:
                self.scores[row].extend(scores[row, :count].clone())
            if self.keep_logits:
                self.logits[row].extend(logits[row, :count].float().clone())
            if not finished:
                committed.append(Committed(row, start, tokens[:count], drafted, min(accepted, count)))
        kept = self.scores if self.keep_scores else None
        if self.stopping.stop(committed, self.sequences[:, : self.known_ends[0]], kept):
            self.finished.copy_(torch.tensor([end is not None for end in self.stopped_at], device="cpu"))
        return committed

    def _unusable(self, scores: Tensor, counts: Tensor) -> Tensor:
        """Rows (`b`) in which the scores of a committed token choose no token."""
        best = scores.amax(dim=-1)  # b n+1; NaN if any score is
        bad = ~best.isfinite() if self.sampling else best.isnan()
        return (bad & in_first(counts, bad.shape[1])).any(dim=1)

    def result(self) -> Tensor:
        """Prompts and committed tokens, `b length`, padded on the right after rows that ended early."""
        sequences = self.sequences[:, : self.length].clone()
        if not self.stopping.rows_run_on:
            ends = torch.tensor(self.stopped_at, device=sequences.device)
            sequences[~in_first(ends, self.length)] = self.pad_token
        return sequences

    def result_steps(self, kept: list[list[Tensor]]) -> tuple[Tensor, ...]:
        """Kept scores or logits in Hugging Face's layout, `b v` a step: zeros after a row's own end.

        In lock-step they are Hugging Face's own values after a row's end.
        """
        width = self.prompts.shape[1]
        ends = [self.length if self.lockstep else end or 0 for end in self.stopped_at]
        blank = torch.zeros_like(kept[0][0])
        return tuple(
            torch.stack([row[i - width] if i < end else blank for row, end in zip(kept, ends, strict=True)])
            for i in range(width, self.length)
        )
