"""Stopping: finds, on the host, where each row ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from selfspec.decoding.acceptance import Committed
from selfspec.decoding.logits_processors import has_stop_token
from selfspec.decoding.pure import is_lasting, is_pure


class Stopping:
    """Rows end at a stop token, at `max_length`, or where one of the other criteria holds.

    Attributes:
        tokens: the stop tokens.
        others: the criteria beyond stop tokens and `max_length`: stop strings, a time limit, the user's own criteria.
        lasting, momentary: those of `others` that hold for every continuation of a text for which they hold; the rest.
        rows_run_on: in lock-step without a stop token, Hugging Face lets stopped rows run on until all rows stop.
        text: `b t`, the rows on the CPU, so that `others` need not read the device; None if nothing looks.
        stopped_at: where each row ended, padding included; None for unfinished rows.
    """

    def __init__(self, criteria: StoppingCriteriaList, prompts: Tensor, max_length: int, lockstep: bool) -> None:
        eos = [criterion.eos_token_id for criterion in criteria if type(criterion) is EosTokenCriteria]
        self.max_length, self.lockstep = max_length, lockstep
        self.tokens = frozenset(token for ids in eos for token in ids.flatten().tolist())
        self.others = StoppingCriteriaList(
            criterion for criterion in criteria if type(criterion) not in (EosTokenCriteria, MaxLengthCriteria)
        )
        self.lasting = [criterion for criterion in self.others if is_lasting(criterion)]
        self.momentary = [criterion for criterion in self.others if not is_lasting(criterion)]
        self.rows_run_on = lockstep and not has_stop_token(criteria)
        self.device = prompts.device
        self.stopped_at: list[int | None] = [None] * prompts.shape[0]
        self.text: Tensor | None = prompts.cpu() if self.others and not lockstep else None

    def stop(self, committed: list[Committed], sequences: Tensor, scores: list[list[Tensor]] | None) -> bool:
        """Note the rows that end with their new tokens, and cut the tokens there.

        In lock-step, `others` look at the `sequences` (`b length`) and the kept scores of all rows at once, as in
        `model.generate`. Returns whether a row ended for a reason that the device cannot find itself.
        """
        for row in committed:
            if self.stopped_at[row.row] is None:
                self.stopped_at[row.row] = self._end_of(row)
        if self.lockstep and self.others:
            steps = None if scores is None else tuple(torch.stack(step) for step in zip(*scores, strict=True))
            stops: Tensor = self.others(sequences.contiguous(), steps)  # type: ignore[arg-type]
            for index, stopped in enumerate(stops.tolist()):
                if stopped and self.stopped_at[index] is None:
                    self.stopped_at[index] = sequences.shape[1]
        if self.rows_run_on:
            return False
        ended = [(row, end) for row in committed if (end := self.stopped_at[row.row]) is not None]
        for row, end in ended:
            row.tokens = row.tokens[: end - row.start]
            row.accepted = min(row.accepted, len(row.tokens))
        return bool(ended) and (self.lockstep or bool(self.others))

    def _end_of(self, row: Committed) -> int | None:
        """Where the row ends if it ends within its new tokens; else None."""
        criteria: Sequence[StoppingCriteria] = ()
        if self.text is not None:
            last = row.start + len(row.tokens)
            if (width := self.text.shape[1]) < last:
                self.text = torch.nn.functional.pad(self.text, (0, max(width, last - width)))
            self.text[row.row, row.start : last] = torch.tensor(row.tokens, device="cpu")
            holds = self._holds(self.lasting, row.row, last)
            criteria = self.others if holds else self.momentary
        for end, token in enumerate(row.tokens, start=row.start + 1):
            if token in self.tokens or end >= self.max_length:
                return end
            if self._holds(criteria, row.row, end):
                return end
        return None

    def _holds(self, criteria: Sequence[StoppingCriteria], row: int, end: int) -> bool:
        """Whether one of the criteria holds for the row's first `end` tokens."""
        if not criteria or self.text is None:
            return False
        text = self.text[row : row + 1, :end]
        # A criterion of the user's own may hold tensors, which are where Hugging Face's `input_ids` are.
        return any(
            bool(criterion(text.to(self.device) if is_pure(criterion) else text, None)) for criterion in criteria
        )
