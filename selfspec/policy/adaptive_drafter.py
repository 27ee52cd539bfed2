"""AdaptiveDrafter: drafts with the drafter that the policy chooses for the round."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from selfspec.decoding.acceptance import Draft
from selfspec.decoding.drafter import Drafter, NoDrafter
from selfspec.decoding.request import Committed, Request
from selfspec.drafters.cascade import LookupFirstDrafter
from selfspec.drafters.layer_skip import LayerSkipDrafter
from selfspec.drafters.prompt_lookup import PromptLookupDrafter
from selfspec.policy.policy import AdaptivePolicy, Choice, Row, Seen
from selfspec.runtime.runtime import Runtime


class AdaptiveDrafter(Drafter):
    """Layer skipping, prompt lookup, lookup first, or none, as the policy chooses.

    Args:
        lookup: looks up in every round, so that the policy can judge it; None without lookup.
    """

    def __init__(self, runtime: Runtime, policy: AdaptivePolicy, lookup: PromptLookupDrafter | None = None) -> None:
        self.runtime, self.policy, self.lookup = runtime, policy, lookup
        self.gamma = max(*policy.layers, *policy.lookups, 0)
        self.looks = lookup is not None
        self.changes = policy.changes
        self._drafters: dict[Choice, Drafter] = {}

    @property
    def key(self) -> Hashable:
        return "adaptive", self.lookup.key if self.lookup else None

    def begin(self, request: Request) -> None:
        if self.lookup:
            self.lookup.begin(request)

    def choose(self, request: Request) -> tuple[Drafter, int]:
        unfinished = [row for row, stop in enumerate(request.stopped_at) if stop is None]
        choice = self.policy.choose([self._row(row) for row in unfinished])
        if choice not in self._drafters:
            self._drafters[choice] = self._drafter(choice)
        return self._drafters[choice].choose(request)

    def draft(self, request: Request, n: int) -> Draft:
        raise AssertionError("the chosen drafter drafts")

    def look(self, request: Request) -> Tensor | None:
        return self.lookup.look(request) if self.lookup else None

    def receive(self, host_values: Sequence[Sequence[int]]) -> None:
        if self.lookup:
            self.lookup.receive(host_values)

    def observe(self, committed: Sequence[Committed]) -> None:
        self.policy.observe([self._seen(row) for row in committed])

    def _row(self, row: int) -> Row:
        return (
            Row(self.lookup.latest_lookup.found[row], self.lookup.latest_lookup.matched[row]) if self.lookup else Row()
        )

    def _seen(self, row: Committed) -> Seen:
        found, matched = self._row(row.row)
        looked_up = self.lookup.latest_lookup.tokens[row.row][:found] if self.lookup else []
        wrong = (at for at, (ours, theirs) in enumerate(zip(row.tokens, looked_up, strict=False)) if ours != theirs)
        right = next(wrong, min(found, len(row.tokens)))
        by_layers = (row.drafted, row.accepted) if row.origin == "layers" else (0, 0)
        return Seen(*by_layers, len(row.tokens), found, matched, right)

    def _drafter(self, choice: Choice) -> Drafter:
        layers = LayerSkipDrafter(self.runtime, choice.layers) if choice.layers else None
        if not choice.lookup or self.lookup is None:
            return layers or NoDrafter()
        lookup = self.lookup.part(choice.lookup, choice.least)
        return LookupFirstDrafter(lookup, layers) if layers is not None else lookup
