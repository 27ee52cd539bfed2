"""Prompt lookup: drafts the tokens that followed an earlier occurrence of the last tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selfspec.decoding.acceptance import Draft, Origin
from selfspec.decoding.drafter import Drafter
from selfspec.decoding.request import Request
from selfspec.plan.lookup import PromptLookup


class Found(NamedTuple):
    """What the latest look found in a row: a match of `matched` tokens, after which `found` `tokens` may be drafted."""

    found: int = 0
    matched: int = 0
    tokens: Sequence[int] = ()


class PromptLookupDrafter(Drafter):
    """Drafts the tokens that followed an earlier occurrence of a row's last tokens in the row itself; needs no pass.

    The longest match counts, of `min_ngram` to `max_ngram` tokens; among equal matches the latest counts. A copy that
    reaches the last committed token continues with its own tokens, so periodic text fills the whole draft. Rows without
    a match draft nothing. (Prompt lookup decoding, A. Saxena 2023; the continuation is ours.)

    `look` writes the draft, so that the round's one read brings its length to the host. On a CPU, an index of the
    committed tokens finds the match in microseconds. In captured rounds and on a GPU, where the host must not read the
    device, one scan of the whole row finds the same match.

    Args:
        lookup: the match lengths, and the draft length.
        latest: by row, what the latest look found; shared by the drafters that `narrowed` makes.
    """

    looks = True

    def __init__(self, lookup: PromptLookup, latest: list[Found] | None = None) -> None:
        self.lookup, self.gamma = lookup, lookup.gamma
        self.latest = [] if latest is None else latest
        self._indices: list[NgramIndex] = []

    @property
    def key(self) -> Hashable:
        return self.lookup.gamma, self.lookup.min_ngram, self.lookup.max_ngram

    @property
    def label(self) -> str:
        return f"lookup {self.gamma}"

    def narrowed(self, gamma: int, min_ngram: int) -> PromptLookupDrafter:
        """A drafter of at most `gamma` tokens after matches of at least `min_ngram`, from this drafter's looks."""
        lookup = PromptLookup(gamma=gamma, min_ngram=min_ngram, max_ngram=self.lookup.max_ngram)
        return PromptLookupDrafter(lookup, self.latest)

    # --- On the host ---

    def begin(self, request: Request) -> None:
        self._indices = []

    def choose(self, request: Request) -> tuple[Drafter, int]:
        return self, max((self.found(row) for row in request.unfinished()), default=0)

    def found(self, row: int) -> int:
        """How many tokens the row may draft in the next round; 0 without a match."""
        found, matched, _ = self.latest[row]
        return min(found, self.gamma) if matched >= self.lookup.min_ngram else 0

    def origin(self, row: int) -> Origin | None:
        return "lookup" if self.found(row) else None

    def receive(self, host_values: Sequence[Sequence[int]]) -> None:
        self.latest[:] = [Found(found, matched, tokens) for found, matched, *tokens in host_values]

    # --- On the device ---

    def look(self, request: Request) -> Tensor:
        """Write the draft after each row's committed tokens; its length and the match's go to `request`'s buffers."""
        sequences, ends = request.sequences, request.ends
        if ends.device.type == "cpu" and not request.is_captured:
            source, matched = self._match_by_index(request)
        else:
            source, matched = latest_match(sequences, request.pads, ends, self.lookup.max_ngram)
        request.found.copy_(request.draft_limits(self.gamma) * (matched >= self.lookup.min_ngram))
        request.matched.copy_(matched)
        steps = torch.arange(self.gamma, device=ends.device)
        period = (ends - source).clamp(min=1)
        tokens = sequences.gather(1, source[:, None] + steps % period[:, None])  # b n
        sequences.scatter_(1, ends[:, None] + steps, tokens)
        return torch.cat([request.found[:, None], matched[:, None], tokens], dim=1)

    def hits(self, request: Request) -> Tensor:
        """How many tokens each row drafts, `b`; 0 without a match."""
        return request.found.clamp(max=self.gamma) * (request.matched >= self.lookup.min_ngram)

    def draft(self, request: Request, n: int) -> Draft:
        columns = request.ends[:, None] + torch.arange(n, device=request.ends.device)
        return Draft(request.sequences.gather(1, columns), self.hits(request).clamp(max=n), None)

    def _match_by_index(self, request: Request) -> tuple[Tensor, Tensor]:
        """As `latest_match`, from indices that grow by the tokens committed since the last look."""
        ends, pads = request.ends.tolist(), request.pads.tolist()
        rewound = any(index.end > end for index, end in zip(self._indices, ends, strict=False))
        if len(self._indices) != len(ends) or rewound:
            self._indices = [NgramIndex(self.lookup.max_ngram, pad) for pad in pads]
        for row, (index, end) in enumerate(zip(self._indices, ends, strict=True)):
            index.extend(request.sequences[row, index.end : end].tolist())
        matches = torch.tensor([index.match for index in self._indices], device="cpu")
        return matches[:, 0], matches[:, 1]


class NgramIndex:
    """The latest end of every run of up to `longest` tokens in a growing text that begins at `start`.

    Attributes:
        end: where the text ends.
        match: the end of the latest earlier occurrence of the longest run of last tokens that has one, and the run's
            length; 0 and 0 without an occurrence.
    """

    def __init__(self, longest: int, start: int = 0) -> None:
        self.end, self.match = start, (0, 0)
        self._latest: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]  # by length, less one
        self._last: tuple[int, ...] = ()

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            self.end += 1
            last = self._last = (*self._last, token)[-len(self._latest) :]
            self.match = (0, 0)
            for length, latest in enumerate(self._latest[: len(last)], start=1):
                run = last[-length:]
                if (place := latest.get(run)) is not None:
                    self.match = (place, length)
                latest[run] = self.end


def latest_match(sequences: Tensor, pads: Tensor, ends: Tensor, max_ngram: int) -> tuple[Tensor, Tensor]:
    """The best earlier match of each row's last tokens: where it ends, `b`, and its length, `b`.

    The longest match of up to `max_ngram` tokens, the latest of equal ones; length 0 without a match. Row r's tokens
    are `sequences[r, pads[r]:ends[r]]`.
    """
    width = sequences.shape[1]
    backs = torch.arange(max_ngram, 0, -1, device=ends.device)
    last = ends[:, None] - backs  # b m, the columns of each row's last tokens
    columns = torch.arange(width, device=ends.device)
    # -1 and -2 equal no token: they replace the padding of a row and the tokens that a short row lacks.
    tokens = torch.where(last >= pads[:, None], sequences.gather(1, last.clamp(min=0)), -1)  # b m
    own = torch.where(columns >= pads[:, None], sequences, -2)  # b s
    # Row k, once flipped, holds at column c the token k + 1 places before c.
    before = torch.nn.functional.pad(own, (max_ngram, 0), value=-2)[:, :-1].unfold(1, width, 1)  # b m s
    equal = (before == tokens[..., None]).byte().flip(1)
    length = equal.cumprod(dim=1, dtype=torch.uint8).sum(dim=1) * (columns < ends[:, None])  # b s
    place = (length * width + columns * (length > 0)).argmax(dim=1)
    return place, length.gather(1, place[:, None])[:, 0]
