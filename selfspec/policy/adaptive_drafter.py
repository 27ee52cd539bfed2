"""AdaptiveDrafter: drafts with the drafter that the policy chooses for the round."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import takewhile

from torch import Tensor

from selfspec.decoding.acceptance import Committed, Draft
from selfspec.decoding.drafter import Drafter, NoDrafter
from selfspec.decoding.request import Request
from selfspec.drafters.cascade import LookupFirstDrafter
from selfspec.drafters.layer_skip import LayerSkipDrafter
from selfspec.drafters.prompt_lookup import Found, PromptLookupDrafter
from selfspec.policy.policy import AdaptivePolicy, Choice, Row, RowOutcome
from selfspec.runtime.runtime import Runtime


class AdaptiveDrafter(Drafter):
    """Layer skipping, prompt lookup, a cascade of both, or plain decoding, as the policy chooses.

    `lookup` looks up in every round, so that the policy can judge lookup; None without lookup.
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
        choice = self.policy.choose([Row(*self._found(row)[:2]) for row in request.unfinished()])
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
        self.policy.observe([self._outcome(row) for row in committed])

    def _found(self, row: int) -> Found:
        return self.lookup.latest[row] if self.lookup else Found()

    def _outcome(self, row: Committed) -> RowOutcome:
        found, matched, tokens = self._found(row.row)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(row.tokens, tokens[:found], strict=False))
        by_layers = (row.drafted, row.accepted) if row.origin == "layers" else (0, 0)
        return RowOutcome(*by_layers, len(row.tokens), found, matched, right=len(list(same)))

    def _drafter(self, choice: Choice) -> Drafter:
        layers = LayerSkipDrafter(self.runtime, choice.layers) if choice.layers else None
        if not choice.lookup or self.lookup is None:
            return layers or NoDrafter()
        lookup = self.lookup.narrowed(choice.lookup, choice.least)
        return LookupFirstDrafter(lookup, layers) if layers is not None else lookup
