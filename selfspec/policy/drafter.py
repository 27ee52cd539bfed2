"""AdaptiveDrafter: whoever the policy chooses."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from selfspec.decoding.acceptance import Draft
from selfspec.decoding.drafter import Drafter, NoDrafter
from selfspec.decoding.request import Committed, Request
from selfspec.drafters.cascade import LookupFirstDrafter
from selfspec.drafters.layer_skip import LayerSkipDrafter
from selfspec.drafters.prompt_lookup import PromptLookupDrafter
from selfspec.policy.adaptive import AdaptivePolicy, Seen
from selfspec.policy.choice import Choice, Row
from selfspec.runtime.runtime import Runtime


class AdaptiveDrafter(Drafter):
    """Layer skipping, prompt lookup, or none, as the policy says.

    Args:
        lookup: looks up in every round, if it may draft at all.
    """

    def __init__(self, runtime: Runtime, policy: AdaptivePolicy, lookup: PromptLookupDrafter | None = None) -> None:
        self.runtime, self.policy, self.lookup = runtime, policy, lookup
        choices = policy.choices
        self.gamma = max(*choices.layers, *choices.lookups)
        self.looks = lookup is not None
        self.changes = policy.changes
        self._parts: dict[Choice, Drafter] = {}

    @property
    def key(self) -> Hashable:
        return "adaptive", self.lookup.key if self.lookup else None

    def begin(self, request: Request) -> None:
        if self.lookup:
            self.lookup.begin(request)

    def choose(self, request: Request) -> tuple[Drafter, int]:
        choice = self.policy.choose(self._rows(request))
        if choice not in self._parts:
            self._parts[choice] = self._part(choice)
        return self._parts[choice].choose(request)

    def draft(self, request: Request, n: int) -> Draft:
        raise AssertionError("the chosen drafter drafts")

    def look(self, request: Request) -> Tensor | None:
        return self.lookup.look(request) if self.lookup else None

    def receive(self, host_values: Sequence[Sequence[int]]) -> None:
        if self.lookup:
            self.lookup.receive(host_values)

    def observe(self, committed: Sequence[Committed]) -> None:
        self.policy.observe([self._seen(row) for row in committed])

    def _rows(self, request: Request) -> list[Row]:
        """Every unfinished row, as the host knows it."""
        longest, ends = len(self.policy.choices.outlook.rounds) - 1, request.known_ends
        going = [row for row, stop in enumerate(request.stopped_at) if stop is None]
        lefts = {row: min(longest, request.max_length - ends[row] - 1) for row in going}
        if self.lookup is None:
            return [Row(0, 0, left) for left in lefts.values()]
        latest_lookup = self.lookup.latest_lookup
        return [Row(latest_lookup.found[row], latest_lookup.matched[row], left) for row, left in lefts.items()]

    def _seen(self, row: Committed) -> Seen:
        by_layers = row.drafted if row.origin == "layers" else 0
        accepted = row.accepted if by_layers else 0
        seen = Seen(by_layers, accepted, len(row.tokens))
        if self.lookup is None or not (found := self.lookup.latest_lookup.found[row.row]):
            return seen
        pairs = zip(row.tokens, self.lookup.latest_lookup.tokens[row.row][:found], strict=False)
        right = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), min(found, len(row.tokens)))
        return seen._replace(found=found, matched=self.lookup.latest_lookup.matched[row.row], right=right)

    def _part(self, choice: Choice) -> Drafter:
        layers = LayerSkipDrafter(self.runtime, choice.layers) if choice.layers else None
        if not choice.lookup or self.lookup is None:
            return layers or NoDrafter()
        lookup = self.lookup.part(choice.lookup, choice.least)
        return LookupFirstDrafter(lookup, layers) if layers is not None else lookup
