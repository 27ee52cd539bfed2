"""Drafters: who guesses the next tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from selfspec.plan import Plan, PromptLookup
from selfspec.processors import process
from selfspec.request import Request
from selfspec.runtime import Runtime
from selfspec.sampling import Draft, one_hot, pick, to_probs


class Drafter(Protocol):
    """Guesses up to `gamma` tokens behind each row's committed ones."""

    gamma: int

    def draft(self, request: Request) -> Draft:
        """Write the drafted tokens behind the committed ones in `request.sequences`, and return them.

        Leaves the cache's lengths as it found them.
        """


def drafter_of(plan: Plan, runtime: Runtime) -> Drafter:
    """The drafter that a plan asks for; the runtime skips the plan's skip set already."""
    layers = LayerSkipDrafter(runtime, plan.gamma, plan.exit_threshold)
    if plan.prompt_lookup is None:
        return layers if plan.gamma else NoDrafter()
    lookup = PromptLookupDrafter(plan.prompt_lookup)
    return LookupFirstDrafter(lookup, layers) if plan.gamma else lookup


@dataclass
class NoDrafter:
    """Plain decoding: drafts nothing, so a round is one token."""

    gamma: int = 0

    def draft(self, request: Request) -> Draft:
        return Draft.empty(request.rows, request.sequences.device)


@dataclass
class LayerSkipDrafter:
    """Drafts with the runtime's draft view: the model without its skip set.

    A row stops drafting where the largest softmax of the draft's raw logits falls below `exit_threshold`; the batch
    stops when every row has. The test looks at the draft's confidence before processors and before a token is drawn:
    testing the drawn token's own probability would bias what comes out.
    """

    runtime: Runtime
    gamma: int
    exit_threshold: float | None = None

    def draft(self, request: Request, among: Tensor | None = None) -> Draft:
        """As the protocol says; only rows `among` (`b`, all by default) draft."""
        lengths, start = self.runtime.cache.lengths, self.runtime.cache.lengths.clone()
        limits = request.draft_limits(self.gamma)  # b
        if among is not None:
            limits = limits * among
        drafted = torch.zeros_like(limits)
        tokens, probs = [], []
        token = request.last_tokens()
        for step in range(int(limits.max())):
            logits = self.runtime.run("draft", token[:, None])  # b 1 v
            going = self._going(logits, drafted == step) & (step < limits)
            if self.exit_threshold is not None and not going.any():
                break
            drafted += going
            token, q = self._next_token(request, logits, step)
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

    def _next_token(self, request: Request, logits: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        ends = request.ends + step  # b
        scores = process(request.processors, logits, request.sequences, ends[:, None])[:, 0]
        token, q = pick(scores, sampling=request.sampling)
        request.sequences.scatter_(1, ends[:, None], token[:, None])
        return token, q


class PromptLookupDrafter:
    """Drafts what followed an earlier occurrence of a row's last tokens, in the row's own context: no pass at all.

    Of all places whose preceding tokens equal the row's last ones, the longest match counts (up to `max_ngram` tokens,
    at least `min_ngram`), and of these the latest. A copy that reaches the last committed token goes on with what it
    drafted itself, so text with a period is continued for as long as the draft may be. Rows without a match draft
    nothing. (Prompt lookup decoding, A. Saxena 2023; the continuation beyond the end is ours.)
    """

    def __init__(self, lookup: PromptLookup) -> None:
        self.lookup, self.gamma = lookup, lookup.gamma

    def draft(self, request: Request) -> Draft:
        sequences, ends = request.sequences, request.ends
        source, matched = latest_match(sequences, request.pads, ends, self.lookup.max_ngram)
        lengths = request.draft_limits(self.gamma) * (matched >= self.lookup.min_ngram)  # b
        steps = torch.arange(int(lengths.max()), device=ends.device)
        period = (ends - source).clamp(min=1)
        tokens = sequences.gather(1, source[:, None] + steps % period[:, None])  # b n
        sequences.scatter_(1, ends[:, None] + steps, tokens)
        return Draft(tokens, lengths, None)


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


class LookupFirstDrafter:
    """A cascade: prompt lookup, and layer skipping in the rows where it found nothing."""

    def __init__(self, lookup: PromptLookupDrafter, layers: LayerSkipDrafter) -> None:
        self.lookup, self.layers = lookup, layers
        self.gamma = max(lookup.gamma, layers.gamma)

    def draft(self, request: Request) -> Draft:
        found = self.lookup.draft(request)
        hit = found.lengths > 0  # b
        if bool(hit.all()):
            return found
        made = self.layers.draft(request, among=~hit)
        n = max(found.tokens.shape[1], made.tokens.shape[1])
        found, made = found.padded(n), made.padded(n)
        tokens = torch.where(hit[:, None], found.tokens, made.tokens)
        columns = torch.arange(n, device=hit.device)
        request.sequences.scatter_(1, request.ends[:, None] + columns, tokens)  # each drafter wrote its own over them
        return Draft(tokens, torch.where(hit, found.lengths, made.lengths), _mixed(hit, tokens, made.probs))


def _mixed(hit: Tensor, tokens: Tensor, probs: Tensor | None) -> Tensor | None:
    """q of a draft whose `hit` rows were looked up: all on the drafted token there."""
    if probs is None:
        return None
    return torch.where(hit[:, None, None], one_hot(tokens, probs), probs)
