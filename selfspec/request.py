"""Request: the rows of one `generate`, what was committed, and when each row ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from selfspec.errors import InputError
from selfspec.sampling import Acceptance, Draft


@dataclass(kw_only=True)
class Request:
    """Rows in Hugging Face's layout: left-padded prompts, then what was committed, then room for a draft.

    Args:
        prompts: `b P`, padded on the left.
        pads: `b`, how many tokens of padding each prompt has.
        max_length: where every row ends at the latest, padding included.
        room: how many tokens may be drafted beyond `max_length` (gamma + 1).
        lockstep: names of processors or criteria that must see each context once; rows then keep one length, finished
            ones by committing padding, exactly as in `model.generate`.
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
        eos = [criterion.eos_token_id for criterion in self.criteria if isinstance(criterion, EosTokenCriteria)]
        self.eos = torch.cat([ids.flatten().to(device) for ids in eos]) if eos else None
        # Without a stop token, Hugging Face lets rows that met a stop string run on until all have met one.
        self.freezes = bool(eos)
        self._other_criteria = [c for c in self.criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]
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
        """Whether every row has stopped and holds as many tokens as the longest of them."""
        if any(end is None for end in self.stopped_at):
            return False
        return self.freezes or int(self.ends.min()) >= self.length

    @property
    def length(self) -> int:
        """The width of the result: where the last row stopped."""
        return max(end or 0 for end in self.stopped_at)

    def commit(self, draft: Draft, acceptance: Acceptance, scores: Tensor, logits: Tensor) -> list[Committed]:
        """Commit each unfinished row's accepted tokens and the one that follows them, up to where the row ends.

        `scores` are the processed target logits `b n+1 v`, `logits` the raw ones.
        """
        counts, new = self._counts_and_tokens(draft, acceptance)
        bad = scores.isnan().flatten(1).any(dim=1)
        was_finished, before = self.finished.clone(), self.ends.clone()
        self.sequences.scatter_(1, self.ends[:, None] + torch.arange(new.shape[1], device=new.device), new)
        self.ends += counts
        # The one read of the round.
        columns = (before, counts, draft.lengths, acceptance.accepted, was_finished, bad)
        read = torch.cat([torch.stack([column.long() for column in columns], dim=1), new], dim=1).tolist()
        committed = []
        for row, (start, count, drafted, accepted, done, nan, *tokens) in enumerate(read):
            if nan and not done:
                raise InputError(
                    f"the model's logits hold NaN in row {row} after {start} tokens; "
                    "check the weights, or use a wider dtype"
                )
            if self.keep_scores and (self.lockstep or not done):
                self.scores[row].extend(scores[row, :count].clone())
            if self.keep_logits and (self.lockstep or not done):
                self.logits[row].extend(logits[row, :count].float().clone())
            if done:
                continue
            committed.append(Committed(row, start, tokens[:count], drafted, min(accepted, count)))
        self._stop(committed)
        return committed

    def _counts_and_tokens(self, draft: Draft, acceptance: Acceptance) -> tuple[Tensor, Tensor]:
        """How many tokens each row commits (`b`), and the candidates (`b n+1`)."""
        new = torch.nn.functional.pad(draft.tokens, (0, 1))
        new.scatter_(1, acceptance.accepted[:, None], acceptance.following[:, None])
        counts = torch.minimum(acceptance.accepted + 1, self.max_length - self.ends)
        if self.eos is not None:
            steps = torch.arange(new.shape[1], device=new.device)
            stops = torch.isin(new, self.eos) & (steps < counts[:, None])
            first = torch.where(stops, steps, new.shape[1]).amin(dim=1)
            counts = torch.minimum(counts, first + 1)
        if self.lockstep:
            new[self.finished] = self.pad_token
            return torch.ones_like(counts), new
        return counts * ~self.finished, new

    def _stop(self, committed: list[Committed]) -> None:
        """Find the rows that end with what was just committed, and where."""
        for row in committed:
            if self.stopped_at[row.row] is None:
                self.stopped_at[row.row] = self._end_of(row)
        if self.lockstep:
            self._stop_in_lockstep()
        for row in committed:
            end = self.stopped_at[row.row]
            if end is not None and (self.freezes or end >= self.max_length):
                self.finished[row.row] = True
                row.tokens = row.tokens[: end - row.start]
                row.accepted = min(row.accepted, len(row.tokens))

    def _end_of(self, row: Committed) -> int | None:
        """Where the row ends, if it does within its new tokens."""
        eos = set() if self.eos is None else set(self.eos.tolist())
        for index, token in enumerate(row.tokens):
            end = row.start + index + 1
            if token in eos or end >= self.max_length:
                return end
            if not self.lockstep and any(self._meets(criterion, row.row, end) for criterion in self._other_criteria):
                return end
        return None

    def _meets(self, criterion: StoppingCriteria, row: int, end: int) -> bool:
        return bool(criterion(self.sequences[row : row + 1, :end], None).item())  # type: ignore[arg-type]

    def _stop_in_lockstep(self) -> None:
        """Show the user's criteria all rows at once, as `model.generate` does."""
        end = int(self.ends[0])
        scores = tuple(torch.stack(step) for step in zip(*self.scores, strict=True)) if self.keep_scores else None
        for criterion in self._other_criteria:
            for row, stops in enumerate(criterion(self.sequences[:, :end], scores).tolist()):  # type: ignore[arg-type]
                if stops and self.stopped_at[row] is None:
                    self.stopped_at[row] = end

    def result(self) -> Tensor:
        """Prompts and committed tokens, `b length`, padded on the right behind rows that ended early."""
        sequences = self.sequences[:, : self.length].clone()
        if self.freezes:
            ends = torch.tensor(self.stopped_at, device=sequences.device)
            columns = torch.arange(self.length, device=sequences.device)
            sequences[columns >= ends[:, None]] = self.pad_token
        return sequences

    def result_steps(self, kept: list[list[Tensor]]) -> tuple[Tensor, ...]:
        """Kept scores or logits as Hugging Face returns them: one `b v` per step; zeros behind a row's own end."""
        width = self.prompts.shape[1]
        ends = [end if self.freezes and not self.lockstep else self.length for end in self.stopped_at]
        blank = torch.zeros_like(kept[0][0])
        return tuple(
            torch.stack([row[i - width] if i < (end or 0) else blank for row, end in zip(kept, ends, strict=True)])
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
