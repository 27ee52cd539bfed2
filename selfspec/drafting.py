"""Drafters: who guesses the next tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from selfspec.plan import Plan, PromptLookup
from selfspec.processors import process
from selfspec.request import Committed, Request
from selfspec.runtime import Runtime
from selfspec.sampling import Draft, one_hot, pick, to_probs


class Drafter(ABC):
    """Guesses up to `gamma` tokens behind each row's committed ones."""

    gamma: int
    capture_obstacle: str | None = None
    """Why what it does cannot be captured, or None if it can."""
    looks = False
    """Whether `look` does anything."""

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """Equal for drafters that do the same."""

    @abstractmethod
    def draft(self, request: Request, n: int) -> Draft:
        """Write up to `n` drafted tokens behind the committed ones in `request.sequences`, and return them, `b n`.

        Leaves the cache's lengths as it found them. Reads the device only if `capture_obstacle` says so.
        """

    def choose(self, request: Request) -> tuple[Drafter, int]:
        """Who drafts in this round, and the most tokens worth drafting, by what the host knows."""
        return self, request.longest_draft(self.gamma)

    def look(self, request: Request) -> None:  # noqa: B027  # most drafters need no look
        """At the end of a round, look at what was committed. Never reads the device."""

    def observe(self, committed: Sequence[Committed]) -> None:  # noqa: B027
        """At the end of a round, learn what came of it."""


def drafter_of(plan: Plan, runtime: Runtime) -> Drafter:
    """The drafter that a plan asks for; the runtime skips the plan's skip set already."""
    layers = LayerSkipDrafter(runtime, plan.gamma, plan.exit_threshold)
    if plan.prompt_lookup is None:
        return layers if plan.gamma else NoDrafter()
    lookup = PromptLookupDrafter(plan.prompt_lookup)
    return LookupFirstDrafter(lookup, layers) if plan.gamma else lookup


class NoDrafter(Drafter):
    """Plain decoding: drafts nothing, so a round is one token."""

    gamma = 0
    key = "none"

    def draft(self, request: Request, n: int = 0) -> Draft:
        return Draft.empty(request.rows, request.sequences.device)


class LayerSkipDrafter(Drafter):
    """Drafts with the runtime's draft view: the model without its skip set.

    A row stops drafting where the largest softmax of the draft's raw logits falls below `exit_threshold`; the batch
    stops when every row has. The test looks at the draft's confidence before processors and before a token is drawn:
    testing the drawn token's own probability would bias what comes out.
    """

    def __init__(self, runtime: Runtime, gamma: int, exit_threshold: float | None = None) -> None:
        self.runtime, self.gamma, self.exit_threshold = runtime, gamma, exit_threshold
        if exit_threshold is not None:
            self.capture_obstacle = "with an exit threshold, drafts end when the device says so"

    @property
    def key(self) -> Hashable:
        return "layers"

    def draft(self, request: Request, n: int, among: Tensor | None = None) -> Draft:
        """As in every drafter; only rows `among` (`b`, all by default) draft."""
        lengths, start = self.runtime.cache.lengths, self.runtime.cache.lengths.clone()
        limits = request.draft_limits(n)  # b
        if among is not None:
            limits = limits * among
        drafted = torch.zeros_like(limits)
        tokens, probs = [], []
        token = request.last_tokens()
        for step in range(n):
            logits = self.runtime.run("draft", token[:, None])  # b 1 v
            going = self._going(logits, drafted == step) & (step < limits)
            if self.exit_threshold is not None and not going.any():
                break
            drafted += going
            token, q = self._next_token(request, logits, step, among)
            tokens.append(token)
            probs.append(q)
            lengths += 1
        lengths.copy_(start)
        if not tokens:
            return Draft.empty(request.rows, lengths.device)
        sampled = [q for q in probs if q is not None]
        return Draft(torch.stack(tokens, dim=1), drafted, torch.stack(sampled, dim=1) if sampled else None)

    def _going(self, logits: Tensor, going: Tensor) -> Tensor:
        if self.exit_threshold is None:
            return going
        return going & (to_probs(logits[:, 0]).amax(dim=-1) >= self.exit_threshold)

    def _next_token(
        self, request: Request, logits: Tensor, step: int, among: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ends = (request.ends + step)[:, None]  # b 1
        scores = process(request.processors, logits, request.sequences, ends)[:, 0]
        token, q = pick(scores, sampling=request.sampling)
        written = token if among is None else torch.where(among, token, request.sequences.gather(1, ends)[:, 0])
        request.sequences.scatter_(1, ends, written[:, None])
        return token, q


class PromptLookupDrafter(Drafter):
    """Drafts what followed an earlier occurrence of a row's last tokens, in the row's own context: no pass at all.

    Of all places whose preceding tokens equal the row's last ones, the longest match counts (up to `max_ngram` tokens,
    at least `min_ngram`), and of these the latest. A copy that reaches the last committed token goes on with what it
    drafted itself, so text with a period is continued for as long as the draft may be. Rows without a match draft
    nothing. (Prompt lookup decoding, A. Saxena 2023; the continuation beyond the end is ours.)

    It looks at the end of a round, so that the round's one read tells the host how much there is to draft.
    """

    looks = True

    def __init__(self, lookup: PromptLookup) -> None:
        self.lookup, self.gamma = lookup, lookup.gamma

    @property
    def key(self) -> Hashable:
        return self.lookup.gamma, self.lookup.min_ngram, self.lookup.max_ngram

    def choose(self, request: Request) -> tuple[Drafter, int]:
        return self, max(request.found_in_unfinished(), default=0)

    def look(self, request: Request) -> None:
        """Write what follows the best match behind each row's committed tokens, and to `request.found` how much."""
        sequences, ends = request.sequences, request.ends
        source, matched = latest_match(sequences, request.pads, ends, self.lookup.max_ngram)
        request.found.copy_(request.draft_limits(self.gamma) * (matched >= self.lookup.min_ngram))
        steps = torch.arange(self.gamma, device=ends.device)
        period = (ends - source).clamp(min=1)
        tokens = sequences.gather(1, source[:, None] + steps % period[:, None])  # b n
        sequences.scatter_(1, ends[:, None] + steps, tokens)

    def draft(self, request: Request, n: int) -> Draft:
        """What `look` found."""
        columns = request.ends[:, None] + torch.arange(n, device=request.ends.device)
        return Draft(request.sequences.gather(1, columns), request.found.clamp(max=n), None)


def latest_match(sequences: Tensor, pads: Tensor, ends: Tensor, max_ngram: int) -> tuple[Tensor, Tensor]:
    """The place `b` behind the best earlier match of each row's last tokens, and how many of them match, `b`.

    The longest match of up to `max_ngram` tokens, the latest of equals; 0 tokens where nothing matches. Row r's tokens
    are `sequences[r, pads[r]:ends[r]]`.
    """
    columns = torch.arange(sequences.shape[1], device=ends.device)
    matching = columns < ends[:, None]  # b s, at column c: tokens before c, from the last one backwards, match so far
    length = torch.zeros_like(sequences)
    for back in range(1, max_ngram + 1):
        token = sequences.gather(1, (ends - back).clamp(min=0)[:, None])
        equal = (sequences == token) & (columns >= pads[:, None]) & ((ends - back) >= pads)[:, None]
        matching = matching & torch.nn.functional.pad(equal, (back, 0))[:, : sequences.shape[1]]
        length += matching
    place = (length * sequences.shape[1] + columns * (length > 0)).argmax(dim=1)
    return place, length.gather(1, place[:, None])[:, 0]


class LookupFirstDrafter(Drafter):
    """A cascade: prompt lookup, and layer skipping in the rows where it found nothing."""

    looks = True

    def __init__(self, lookup: PromptLookupDrafter, layers: LayerSkipDrafter) -> None:
        self.lookup, self.layers = lookup, layers
        self.gamma = max(lookup.gamma, layers.gamma)
        self.capture_obstacle = layers.capture_obstacle

    @property
    def key(self) -> Hashable:
        return "lookup first", self.lookup.key

    def look(self, request: Request) -> None:
        self.lookup.look(request)

    def choose(self, request: Request) -> tuple[Drafter, int]:
        found = request.found_in_unfinished()
        if all(found):
            return self.lookup, max(found, default=0)
        return self, max(*found, request.longest_draft(self.layers.gamma))

    def draft(self, request: Request, n: int) -> Draft:
        hit = request.found > 0  # b
        made = self.layers.draft(request, min(n, self.layers.gamma), among=~hit).padded(n)
        found = self.lookup.draft(request, n)
        return Draft(
            torch.where(hit[:, None], found.tokens, made.tokens),
            torch.where(hit, found.lengths, made.lengths),
            _mixed(hit, found.tokens, made.probs),
        )


def _mixed(hit: Tensor, tokens: Tensor, probs: Tensor | None) -> Tensor | None:
    """q of a draft whose `hit` rows were looked up: all on the drafted token there."""
    if probs is None:
        return None
    return torch.where(hit[:, None, None], one_hot(tokens, probs), probs)
