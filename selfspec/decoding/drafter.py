"""Drafter: the protocol of all who guess the next tokens; and the one that does not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

from torch import Tensor

from selfspec.decoding.acceptance import Draft
from selfspec.decoding.request import Committed, Origin, Request


class Drafter(ABC):
    """Guesses up to `gamma` tokens behind each row's committed ones.

    A drafter that `looks` sees the committed tokens at the end of every round, on the device; what it returns reaches
    it again on the host with the round's one read, so that it may choose by it.
    """

    gamma: int
    uncaptured_reason: str | None = None
    """Why what it does cannot be captured, or None if it can."""
    looks = False
    """Whether `look` does anything."""
    changes: Sequence[str] = ()
    """When it came to choose differently, and why, in words."""

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """Equal for drafters that do the same."""

    @property
    def label(self) -> str:
        """What people call it: `layers 4`."""
        return str(self.key)

    @abstractmethod
    def draft(self, request: Request, n: int) -> Draft:
        """Write up to `n` drafted tokens behind the committed ones in `request.sequences`, and return them, `b n`.

        Leaves the cache's lengths as it found them. Reads the device only if `uncaptured_reason` says so.
        """

    def begin(self, request: Request) -> None:  # noqa: B027  # most drafters keep nothing of their own
        """Before a request's first round: its prompts are cached."""

    def choose(self, request: Request) -> tuple[Drafter, int]:
        """Who drafts in this round, and the most tokens worth drafting, by what the host knows."""
        return self, request.longest_draft(self.gamma)

    def origin(self, row: int) -> Origin | None:
        """Who drafts in this row in this round, by what the host knows."""
        return None

    def look(self, request: Request) -> Tensor | None:
        """At the end of a round, look at what was committed: what the host is to be told, `b m`. Never reads the
        device."""
        return None

    def receive(self, host_values: Sequence[Sequence[int]]) -> None:  # noqa: B027
        """On the host, what the last look found in every row."""

    def observe(self, committed: Sequence[Committed]) -> None:  # noqa: B027
        """At the end of a round, learn what came of it."""


class NoDrafter(Drafter):
    """Plain decoding: drafts nothing, so a round is one token."""

    gamma = 0
    key = "none"
    label = "none"

    def draft(self, request: Request, n: int = 0) -> Draft:
        return Draft.empty(request.rows, request.sequences.device)
