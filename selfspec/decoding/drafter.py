"""Drafter: the protocol of a drafter in a round; and NoDrafter, plain decoding.

The round calls a drafter's methods in this order:

    begin(request)       once, after prefill
    choose(request)      host: which drafter drafts this round, and at most how many tokens
    draft(request, n)    device: the drafted tokens; called on the chosen drafter
    look(request)        device: after commit and rewind, read the committed tokens; also once after prefill
    observe(committed)   host: learn what the round committed
    receive(values)      host: the values that `look` returned, which reach the host with the round's one read

So a drafter that looks at the committed tokens (prompt lookup) chooses by them without a read of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

from torch import Tensor

from selfspec.decoding.acceptance import Committed, Draft, Origin
from selfspec.decoding.request import Request


class Drafter(ABC):
    """Drafts up to `gamma` tokens after each row's committed tokens. The module's docstring gives the order of calls.

    Attributes:
        uncaptured_reason: why the drafter's work cannot be captured; None if it can.
        looks: whether `look` returns values.
        changes: each change of what the drafter chooses, and the reason, for people.
    """

    gamma: int
    uncaptured_reason: str | None = None
    looks = False
    changes: Sequence[str] = ()

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """Equal for drafters that do the same work."""

    @property
    def label(self) -> str:
        """The drafter's name for people: `layers 4`."""
        return str(self.key)

    @abstractmethod
    def draft(self, request: Request, n: int) -> Draft:
        """Write up to `n` drafted tokens after the committed tokens in `request.sequences`; return the tokens, `b n`.

        Leaves the cache's lengths unchanged. Reads the device only with an `uncaptured_reason`.
        """

    def begin(self, request: Request) -> None:  # noqa: B027  # most drafters keep no state
        """Reset the drafter for a new request, whose prompts are cached."""

    def choose(self, request: Request) -> tuple[Drafter, int]:
        """The drafter of this round, and the most tokens worth drafting."""
        return self, request.longest_draft(self.gamma)

    def origin(self, row: int) -> Origin | None:
        """The drafter that drafts in this row in this round."""
        return None

    def look(self, request: Request) -> Tensor | None:
        """Read the committed tokens; values for `receive`, `b m`. Never reads the device."""
        return None

    def receive(self, host_values: Sequence[Sequence[int]]) -> None:  # noqa: B027
        """Take the values of the latest `look`, by row."""

    def observe(self, committed: Sequence[Committed]) -> None:  # noqa: B027
        """Learn what the round committed in each unfinished row."""


class NoDrafter(Drafter):
    """Plain decoding: drafts nothing, so a round commits one token."""

    gamma = 0
    key = "none"

    def draft(self, request: Request, n: int = 0) -> Draft:
        return Draft.empty(request.rows, request.sequences.device)
