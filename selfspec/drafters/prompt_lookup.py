"""Prompt lookup: what followed an earlier occurrence of the last tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from selfspec.decoding.acceptance import Draft
from selfspec.decoding.drafter import Drafter
from selfspec.decoding.request import Origin, Request
from selfspec.plan import PromptLookup


@dataclass
class LookupResult:
    """What the host was told of the latest look.

    Attributes:
        found: by row, how many tokens there are to draft in the next round; 0 without a match.
        matched: by row, how many of its last tokens stand at the place that was found.
        tokens: by row, what stands behind that place.
    """

    found: list[int] = field(default_factory=list)
    matched: list[int] = field(default_factory=list)
    tokens: list[Sequence[int]] = field(default_factory=list)


class PromptLookupDrafter(Drafter):
    """Drafts what followed an earlier occurrence of a row's last tokens, in the row's own context: no pass at all.

    Of all places whose preceding tokens equal the row's last ones, the longest match counts (up to `max_ngram` tokens,
    at least `min_ngram`), and of these the latest. A copy that reaches the last committed token goes on with what it
    drafted itself, so text with a period is continued for as long as the draft may be. Rows without a match draft
    nothing. (Prompt lookup decoding, A. Saxena 2023; the continuation beyond the end is ours.)

    It looks at the end of a round, so that the round's one read tells the host how much there is to draft: with one
    scan of the whole context where reading the device would stall it, else by an index of the tokens committed so far,
    which takes microseconds. Both find the same.

    Args:
        lookup: what counts as a match, and how much of what follows is drafted.
        heard: what the latest look found; shared with those who draft less of what another one looks up.
    """

    looks = True

    def __init__(self, lookup: PromptLookup, latest_lookup: LookupResult | None = None) -> None:
        self.lookup, self.gamma = lookup, lookup.gamma
        self.latest_lookup = latest_lookup or LookupResult()
        self._indices: list[NgramIndex] = []

    @property
    def key(self) -> Hashable:
        return self.lookup.gamma, self.lookup.min_ngram, self.lookup.max_ngram

    @property
    def label(self) -> str:
        return f"lookup {self.gamma}"

    def part(self, gamma: int, min_ngram: int) -> PromptLookupDrafter:
        """One that drafts less of what this one finds, and only behind longer matches."""
        lookup = PromptLookup(gamma=gamma, min_ngram=min_ngram, max_ngram=self.lookup.max_ngram)
        return PromptLookupDrafter(lookup, self.latest_lookup)

    def choose(self, request: Request) -> tuple[Drafter, int]:
        return self, max(self.found_in_unfinished(request), default=0)

    def found_in_unfinished(self, request: Request) -> list[int]:
        """How many tokens there are to draft for each unfinished row, as the host was told."""
        return [self._found(row) for row, stop in enumerate(request.stopped_at) if stop is None]

    def origin(self, row: int) -> Origin | None:
        return "lookup" if self._found(row) else None

    def _found(self, row: int) -> int:
        return (
            min(self.latest_lookup.found[row], self.gamma)
            if self.latest_lookup.matched[row] >= self.lookup.min_ngram
            else 0
        )

    def begin(self, request: Request) -> None:
        self._indices = []

    def look(self, request: Request) -> Tensor:
        """Write what follows the best match behind each row's committed tokens, and to `request.found` how much."""
        sequences, ends = request.sequences, request.ends
        by_index = ends.device.type == "cpu" and not request.is_captured
        source, matched = (
            self._latest_match(request)
            if by_index
            else latest_match(sequences, request.pads, ends, self.lookup.max_ngram)
        )
        request.found.copy_(request.draft_limits(self.gamma) * (matched >= self.lookup.min_ngram))
        request.matched.copy_(matched)
        steps = torch.arange(self.gamma, device=ends.device)
        period = (ends - source).clamp(min=1)
        tokens = sequences.gather(1, source[:, None] + steps % period[:, None])  # b n
        sequences.scatter_(1, ends[:, None] + steps, tokens)
        return torch.cat([request.found[:, None], matched[:, None], tokens], dim=1)

    def _latest_match(self, request: Request) -> tuple[Tensor, Tensor]:
        """As `latest_match`, from what the last look knew and the tokens committed since."""
        ends, pads = request.ends.tolist(), request.pads.tolist()
        gone_back = any(index.end > end for index, end in zip(self._indices, ends, strict=False))
        if len(self._indices) != len(ends) or gone_back:
            self._indices = [NgramIndex(self.lookup.max_ngram, pad) for pad in pads]
        for row, (index, end) in enumerate(zip(self._indices, ends, strict=True)):
            if index.end < end:
                index.extend(request.sequences[row, index.end : end].tolist())
        matches = torch.tensor([index.match for index in self._indices])
        return matches[:, 0], matches[:, 1]

    def receive(self, host_values: Sequence[Sequence[int]]) -> None:
        self.latest_lookup.found = [found for found, *_ in host_values]
        self.latest_lookup.matched = [matched for _, matched, *_ in host_values]
        self.latest_lookup.tokens = [tokens for _, _, *tokens in host_values]

    def hits(self, request: Request) -> Tensor:
        """How many tokens it drafts in each row, `b`; 0 without a match."""
        return request.found.clamp(max=self.gamma) * (request.matched >= self.lookup.min_ngram)

    def draft(self, request: Request, n: int) -> Draft:
        """What `look` found."""
        columns = request.ends[:, None] + torch.arange(n, device=request.ends.device)
        return Draft(request.sequences.gather(1, columns), self.hits(request).clamp(max=n), None)


class NgramIndex:
    """Where every run of up to `longest` tokens of a growing text ended last.

    Attributes:
        end: where the text ends, if it begins at `start`.
        match: the place behind the latest earlier occurrence of the longest run of last tokens that has one, and how
            long that run is; 0 and 0 without any.
    """

    def __init__(self, longest: int, start: int = 0) -> None:
        self.end, self.match = start, (0, 0)
        self._latest: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]  # by length, less one
        self._last: tuple[int, ...] = ()

    def extend(self, tokens: Sequence[int]) -> None:
        """More of the text; at least one token."""
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
    """The place `b` behind the best earlier match of each row's last tokens, and how many of them match, `b`.

    The longest match of up to `max_ngram` tokens, the latest of equals; 0 tokens where nothing matches. Row r's tokens
    are `sequences[r, pads[r]:ends[r]]`.
    """
    width = sequences.shape[1]
    backs = torch.arange(max_ngram, 0, -1, device=ends.device)
    last = ends[:, None] - backs  # b m, where each row's last tokens stand
    columns = torch.arange(width, device=ends.device)
    # A token that no text holds stands for those that a row does not have, and for its padding.
    tokens = torch.where(last >= pads[:, None], sequences.gather(1, last.clamp(min=0)), -1)  # b m
    own = torch.where(columns >= pads[:, None], sequences, -2)  # b s
    # In row k stands, at column c, the token k + 1 places before it, back from the last one once it is flipped.
    before = torch.nn.functional.pad(own, (max_ngram, 0), value=-2)[:, :-1].unfold(1, width, 1)  # b m s
    equal = (before == tokens[..., None]).byte().flip(1)
    length = equal.cumprod(dim=1, dtype=torch.uint8).sum(dim=1) * (columns < ends[:, None])  # b s
    place = (length * width + columns * (length > 0)).argmax(dim=1)
    return place, length.gather(1, place[:, None])[:, 0]
