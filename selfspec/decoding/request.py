"""Request: the rows of one `generate`, what was committed, and when each row ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from selfspec.decoding.acceptance import Acceptance, Draft
from selfspec.decoding.logits_processors import (
    has_stop_token,
    ignoring_padding,
    looking_at,
    settings_of,
    uncaptured_reason,
)
from selfspec.errors import InputError
from selfspec.runtime.row_buffers import STOP_TOKENS, RowBuffers

Origin = Literal["lookup", "layers", "draft model"]
"""Who drafts."""


@dataclass(kw_only=True)
class Request:
    """Rows in Hugging Face's layout: left-padded prompts, then what was committed, then room for a draft.

    Args:
        prompts: `b P`, padded on the left.
        pads: `b`, how many tokens of padding each prompt has.
        max_length: where every row ends at the latest, padding included.
        room: how many tokens may be drafted beyond `max_length` (gamma + 1).
        lockstep: why rows must advance one token at a time (`needs_lockstep`); they then keep one length, finished ones
            by committing padding, exactly as in `model.generate`. Empty if they need not.
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
        b, device = self.rows, self.prompts.device
        eos = [criterion.eos_token_id for criterion in self.criteria if type(criterion) is EosTokenCriteria]
        self._stop_tokens = frozenset(token for ids in eos for token in ids.flatten().tolist())
        self._runs_on = bool(self.lockstep) and not has_stop_token(self.criteria)  # rows that stopped, until all have
        self._other_criteria = StoppingCriteriaList(
            criterion for criterion in self.criteria if type(criterion) not in (EosTokenCriteria, MaxLengthCriteria)
        )
        self.scores: list[list[Tensor]] = [[] for _ in range(b)]
        self.logits: list[list[Tensor]] = [[] for _ in range(b)]
        self.is_captured = False
        self._own_pads = self.pads
        self.processors = ignoring_padding(self.processors, self.pads)
        self.begin_in(RowBuffers(b, self.max_length + self.room, device, len(self._stop_tokens)))

    def begin_captured_in(self, buffers: RowBuffers) -> None:
        """Begin in buffers that outlive the request; only where `uncaptured_reason` has nothing against it."""
        self.begin_in(buffers)
        self.is_captured = True
        self.processors = looking_at(self.processors, buffers.pads)

    def begin_in(self, buffers: RowBuffers) -> None:
        """Begin, or begin anew, with nothing committed, in these buffers."""
        width = self.prompts.shape[1]
        self.buffers = buffers
        self.sequences, self.pads, self.ends = buffers.sequences, buffers.pads, buffers.ends
        self.finished, self.found, self.matched = buffers.finished, buffers.found, buffers.matched
        self.sequences.zero_()  # a token of every model's, which the one that pads need not be
        self.sequences[:, :width] = self.prompts
        self.pads.copy_(self._own_pads)
        self.found.zero_()
        self.matched.zero_()
        buffers.stop_tokens.fill_(-1)
        for index, token in enumerate(sorted(self._stop_tokens)):
            buffers.stop_tokens[index] = token
        self.rewind()
        # Criteria that look at the text get a copy on the CPU, so that they need not read the device.
        looks = bool(self._other_criteria) and not self.lockstep
        self._text = self.prompts.new_full(self.sequences.shape, self.pad_token, device="cpu") if looks else None
        if self._text is not None:
            self._text[:, :width] = self.prompts.cpu()

    def rewind(self) -> None:
        """Back to the prompts, with nothing committed."""
        width = self.prompts.shape[1]
        self.ends.fill_(width)
        self.finished.fill_(False)
        self.buffers.limit.fill_(self.max_length)
        self.known_ends = [width] * self.rows
        self.stopped_at: list[int | None] = [None] * self.rows

    def uncaptured_reason(self) -> str | None:
        """Why its rounds cannot be captured, or None if they can."""
        if self.lockstep:
            return "rows advance one token at a time"
        if len(self._stop_tokens) > STOP_TOKENS:
            return f"there are {len(self._stop_tokens)} stop tokens, and captured rounds have room for {STOP_TOKENS}"
        return uncaptured_reason(self.processors)

    @property
    def capture_key(self) -> tuple[object, ...]:
        """What is baked into captured rounds: equal for requests that can share them."""
        return (self.sampling, *map(settings_of, self.processors))

    @property
    def rows(self) -> int:
        return self.prompts.shape[0]

    def last_tokens(self) -> Tensor:
        """Each row's last committed token, `b`."""
        return self.sequences.gather(1, self.ends[:, None] - 1)[:, 0]

    def draft_limits(self, gamma: int) -> Tensor:
        """The most tokens worth drafting in each row, `b`: a round commits one token more than it accepts."""
        return (self.buffers.limit - self.ends - 1).clamp(0, gamma) * ~self.finished

    def longest_draft(self, gamma: int) -> int:
        """The largest of `draft_limits`, without a read of the device."""
        stops = zip(self.known_ends, self.stopped_at, strict=True)
        return max((min(gamma, self.max_length - end - 1) for end, stop in stops if stop is None), default=0)

    def has_ended(self, row: int) -> bool:
        """Whether the row no longer commits, as the host was told."""
        return self.stopped_at[row] is not None and not self._runs_on

    def is_done(self) -> bool:
        """Whether every row has stopped."""
        return all(end is not None for end in self.stopped_at)

    @property
    def length(self) -> int:
        """The width of the result: where the last row stopped."""
        return max(end or 0 for end in self.stopped_at)

    def commit(self, draft: Draft, acceptance: Acceptance, scores: Tensor) -> Tensor:
        """Commit each unfinished row's accepted tokens and the one that follows them, up to where the row ends.

        `scores` are the processed target logits `b n+1 v`. Works on the device alone; returns what `take` is to be
        told, `b m`.
        """
        counts, new = self._counts_and_tokens(draft, acceptance)
        unusable = self._unusable(scores, counts)
        columns = (self.ends, counts, draft.lengths, acceptance.accepted, self.finished, unusable)
        host_values = torch.cat([torch.stack([column.long() for column in columns], dim=1), new], dim=1)
        self.sequences.scatter_(1, self.ends[:, None] + torch.arange(new.shape[1], device=new.device), new)
        self.ends += counts
        if not self.lockstep:
            stops = self._is_stop(new) & _first(counts, new.shape[1])
            self.finished |= stops.any(dim=1) | (self.ends >= self.buffers.limit)
        return host_values

    def take(self, host_values: list[list[int]], scores: Tensor, logits: Tensor) -> list[Committed]:
        """On the host, what was committed in every unfinished row, and what ends with it.

        `host_values` is what `commit` returned, read; `scores` and the raw `logits` are `b n+1 v`.
        """
        committed = []
        for row, (start, count, drafted, accepted, done, bad, *tokens) in enumerate(host_values):
            if bad and not done:
                raise InputError(
                    f"the model's logits hold NaN or infinity in row {row} after {start} tokens; "
                    "check the weights and the logits processors, or use a wider dtype"
                )
            self.known_ends[row] = start + count
            if self.keep_scores:
                self.scores[row].extend(scores[row, :count].clone())
            if self.keep_logits:
                self.logits[row].extend(logits[row, :count].float().clone())
            if not done:
                committed.append(Committed(row, start, tokens[:count], drafted, min(accepted, count)))
        self._stop(committed)
        return committed

    def _counts_and_tokens(self, draft: Draft, acceptance: Acceptance) -> tuple[Tensor, Tensor]:
        """How many tokens each row commits (`b`), and the candidates (`b n+1`)."""
        new = torch.nn.functional.pad(draft.tokens, (0, 1))
        new.scatter_(1, acceptance.accepted[:, None], acceptance.following[:, None])
        if self.lockstep:
            return torch.ones_like(self.ends), torch.where(self.finished[:, None], self.pad_token, new)
        counts = torch.minimum(acceptance.accepted + 1, self.buffers.limit - self.ends)
        steps = torch.arange(new.shape[1], device=new.device)
        stops = self._is_stop(new) & _first(counts, new.shape[1])
        first = torch.where(stops, steps, new.shape[1]).amin(dim=1)
        return torch.minimum(counts, first + 1) * ~self.finished, new

    def _is_stop(self, tokens: Tensor) -> Tensor:
        return (tokens[..., None] == self.buffers.stop_tokens).any(dim=-1)

    def _unusable(self, scores: Tensor, counts: Tensor) -> Tensor:
        """Rows (`b`) from whose scores no token can be told, among those that are committed."""
        best = scores.amax(dim=-1)  # b n+1; NaN if any is
        bad = ~best.isfinite() if self.sampling else best.isnan()
        return (bad & _first(counts, bad.shape[1])).any(dim=1)

    def _stop(self, committed: list[Committed]) -> None:
        """Find the rows that end with what was just committed, and where."""
        for row in committed:
            if self._text is not None:
                self._text[row.row, row.start : row.start + len(row.tokens)] = torch.tensor(row.tokens)
            if self.stopped_at[row.row] is None:
                self.stopped_at[row.row] = self._end_of(row)
        if self.lockstep and self._other_criteria:
            self._stop_in_lockstep()
        if self._runs_on:
            return
        ended = [(row, end) for row in committed if (end := self.stopped_at[row.row]) is not None]
        for row, end in ended:
            row.tokens = row.tokens[: end - row.start]
            row.accepted = min(row.accepted, len(row.tokens))
        if ended and (self.lockstep or self._other_criteria):  # stop tokens and the limit the device knows itself
            self.finished.copy_(torch.tensor([end is not None for end in self.stopped_at]))

    def _end_of(self, row: Committed) -> int | None:
        """Where the row ends, if it does within its new tokens."""
        for end, token in enumerate(row.tokens, start=row.start + 1):
            if token in self._stop_tokens or end >= self.max_length:
                return end
            if self._text is not None and bool(self._other_criteria(self._text[row.row : row.row + 1, :end], None)):
                return end
        return None

    def _stop_in_lockstep(self) -> None:
        """Show the user's criteria all rows at once, as `model.generate` does."""
        end = self.known_ends[0]
        scores = tuple(torch.stack(step) for step in zip(*self.scores, strict=True)) if self.keep_scores else None
        stops: Tensor = self._other_criteria(self.sequences[:, :end].contiguous(), scores)  # type: ignore[arg-type]
        for row, stopped in enumerate(stops.tolist()):
            if stopped and self.stopped_at[row] is None:
                self.stopped_at[row] = end

    def result(self) -> Tensor:
        """Prompts and committed tokens, `b length`, padded on the right behind rows that ended early."""
        sequences = self.sequences[:, : self.length].clone()
        if not self._runs_on:
            ends = torch.tensor(self.stopped_at, device=sequences.device)
            columns = torch.arange(self.length, device=sequences.device)
            sequences[columns >= ends[:, None]] = self.pad_token
        return sequences

    def result_steps(self, kept: list[list[Tensor]]) -> tuple[Tensor, ...]:
        """Kept scores or logits as Hugging Face returns them, one `b v` per step.

        Behind a row's own end they are zeros; in lock-step, what Hugging Face computes there.
        """
        width = self.prompts.shape[1]
        ends = [self.length if self.lockstep else end or 0 for end in self.stopped_at]
        blank = torch.zeros_like(kept[0][0])
        return tuple(
            torch.stack([row[i - width] if i < end else blank for row, end in zip(kept, ends, strict=True)])
            for i in range(width, self.length)
        )


def _first(counts: Tensor, width: int) -> Tensor:
    """Whether a column is among each row's first `counts` (`b`): `b width`."""
    return torch.arange(width, device=counts.device) < counts[:, None]


@dataclass
class Committed:
    """What one round committed in one row: `tokens`, of which the first `accepted` were drafted, by `origin`."""

    row: int
    start: int
    tokens: list[int]
    drafted: int
    accepted: int
    origin: Origin | None = None
