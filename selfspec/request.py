"""Request: the rows of one `generate`, what was committed, and when each row ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from selfspec.errors import InputError
from selfspec.processors import has_stop_token
from selfspec.sampling import Acceptance, Draft


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
        b, width = self.prompts.shape
        device = self.prompts.device
        self.sequences = self.prompts.new_full((b, self.max_length + self.room), self.pad_token)
        self.sequences[:, :width] = self.prompts
        self.ends = torch.full((b,), width, device=device)  # b, committed tokens of each row, padding included
        self.finished = torch.zeros(b, dtype=torch.bool, device=device)  # b, rows that no longer commit
        self.stopped_at: list[int | None] = [None] * b
        eos = [criterion.eos_token_id for criterion in self.criteria if type(criterion) is EosTokenCriteria]
        self.eos = torch.cat([ids.flatten().to(device) for ids in eos]) if eos else None
        self._eos_tokens = frozenset() if self.eos is None else frozenset(self.eos.tolist())
        self._runs_on = bool(self.lockstep) and not has_stop_token(self.criteria)  # rows that stopped, until all have
        self._other_criteria = StoppingCriteriaList(
            criterion for criterion in self.criteria if type(criterion) not in (EosTokenCriteria, MaxLengthCriteria)
        )
        self.scores: list[list[Tensor]] = [[] for _ in range(b)]
        self.logits: list[list[Tensor]] = [[] for _ in range(b)]

    @property
    def rows(self) -> int:
        return self.prompts.shape[0]

    def last_tokens(self) -> Tensor:
        """Each row's last committed token, `b`."""
        return self.sequences.gather(1, self.ends[:, None] - 1)[:, 0]

    def draft_limits(self, gamma: int) -> Tensor:
        """The most tokens worth drafting in each row, `b`: a round commits one token more than it accepts."""
        return (self.max_length - self.ends - 1).clamp(0, gamma) * ~self.finished

    def is_done(self) -> bool:
        """Whether every row has stopped."""
        return all(end is not None for end in self.stopped_at)

    @property
    def length(self) -> int:
        """The width of the result: where the last row stopped."""
        return max(end or 0 for end in self.stopped_at)

    def commit(self, draft: Draft, acceptance: Acceptance, scores: Tensor, logits: Tensor) -> list[Committed]:
        """Commit each unfinished row's accepted tokens and the one that follows them, up to where the row ends.

        `scores` are the processed target logits `b n+1 v`, `logits` the raw ones.
        """
        counts, new = self._counts_and_tokens(draft, acceptance)
        unusable = self._unusable(scores, counts)
        was_finished, before = self.finished.clone(), self.ends.clone()
        self.sequences.scatter_(1, self.ends[:, None] + torch.arange(new.shape[1], device=new.device), new)
        self.ends += counts
        # The one read of the round.
        columns = (before, counts, draft.lengths, acceptance.accepted, was_finished, unusable)
        read = torch.cat([torch.stack([column.long() for column in columns], dim=1), new], dim=1).tolist()
        committed = []
        for row, (start, count, drafted, accepted, done, bad, *tokens) in enumerate(read):
            if bad and not done:
                raise InputError(
                    f"the model's logits hold NaN or infinity in row {row} after {start} tokens; "
                    "check the weights and the logits processors, or use a wider dtype"
                )
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
        counts = torch.minimum(acceptance.accepted + 1, self.max_length - self.ends)
        if self.eos is not None:
            steps = torch.arange(new.shape[1], device=new.device)
            stops = torch.isin(new, self.eos) & (steps < counts[:, None])
            first = torch.where(stops, steps, new.shape[1]).amin(dim=1)
            counts = torch.minimum(counts, first + 1)
        return counts * ~self.finished, new

    def _unusable(self, scores: Tensor, counts: Tensor) -> Tensor:
        """Rows (`b`) from whose scores no token can be told, among those that are committed."""
        best = scores.amax(dim=-1)  # b n+1; NaN if any is
        bad = ~best.isfinite() if self.sampling else best.isnan()
        return (bad & (torch.arange(bad.shape[1], device=bad.device) < counts[:, None])).any(dim=1)

    def _stop(self, committed: list[Committed]) -> None:
        """Find the rows that end with what was just committed, and where."""
        for row in committed:
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
        if ended:
            self.finished.copy_(torch.tensor([end is not None for end in self.stopped_at]))

    def _end_of(self, row: Committed) -> int | None:
        """Where the row ends, if it does within its new tokens."""
        for end, token in enumerate(row.tokens, start=row.start + 1):
            if token in self._eos_tokens or end >= self.max_length:
                return end
            if not self.lockstep and self._other_criteria and self._other_stops(row.row, row.row + 1, end)[0]:
                return end
        return None

    def _stop_in_lockstep(self) -> None:
        """Show the user's criteria all rows at once, as `model.generate` does."""
        end = int(self.ends[0])
        for row, stops in enumerate(self._other_stops(0, self.rows, end)):
            if stops and self.stopped_at[row] is None:
                self.stopped_at[row] = end

    def _other_stops(self, first: int, last: int, end: int) -> list[bool]:
        """Which of these rows stop at `end` by another criterion than a stop token or the limit."""
        scores = None
        if self.keep_scores and self.lockstep:
            scores = tuple(torch.stack(step) for step in zip(*self.scores, strict=True))
        sequences = self.sequences[first:last, :end].contiguous()
        stops: list[bool] = self._other_criteria(sequences, scores).tolist()  # type: ignore[arg-type]
        return stops

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


@dataclass
class Committed:
    """What one round committed in one row: `tokens`, of which the first `accepted` were drafted."""

    row: int
    start: int
    tokens: list[int]
    drafted: int
    accepted: int
