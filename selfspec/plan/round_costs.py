"""RoundCosts and PassLengths: what rounds cost, and which pass lengths are fast, on the device of the search."""

from __future__ import annotations

from bisect import bisect_right
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from selfspec.plan.lookup import MOST_DRAFTED
from selfspec.plan.schema import Setting

Share = Annotated[float, Field(ge=0, le=1)]
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]

MATCHES = (1, 2, 3, 5, 8)
"""Tokens: the shortest match of each length class of prompt lookup; the last class has no end."""


def match_class(matched: int) -> int:
    """The index of the length class of a match of `matched` tokens."""
    return bisect_right(MATCHES, matched) - 1


class RoundCosts(Setting):
    """What the search expects of drafts of every kind and length, on its device: what a policy starts from.

    Args:
        rows: how many are decoded together; all figures are for all of them.
        draft_step: seconds to draft one token in every row.
        rounds: seconds of all but drafting in a round over 0, 1, ... drafted tokens.
        agreement: of drafts by layers, by draft position.
        lookup: seconds of prompt lookup in a round.
        matches: of prompt lookup, by the length class of its match (`MATCHES`): how often the first looked-up token is
            right, and how often a later one is where all before it were; empty where prompt lookup takes no part.
    """

    rows: Annotated[int, Field(ge=1)]
    draft_step: Cost
    rounds: Annotated[
        list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=2, max_length=MOST_DRAFTED + 1)
    ]
    agreement: Annotated[list[Share], Field(min_length=1)]
    lookup: Cost = 0.0
    matches: list[Annotated[list[Share], Field(min_length=2, max_length=2)]] = Field(
        default_factory=list, max_length=len(MATCHES)
    )

    @model_validator(mode="after")
    def _knows_every_match(self) -> Self:
        if len(self.matches) not in (0, len(MATCHES)):
            raise ValueError(f"matches are of {len(MATCHES)} lengths, or none")
        return self

    def between(self, other: RoundCosts, rows: int) -> RoundCosts:
        """What so many rows cost, between the costs of fewer and of more."""
        weight = (rows - self.rows) / (other.rows - self.rows)
        changed: dict[str, Any] = {"rows": rows}
        for name in ("draft_step", "lookup"):
            changed[name] = _between(getattr(self, name), getattr(other, name), weight)
        pairs = zip(self.rounds, other.rounds, strict=False)
        return self.model_copy(update=changed | {"rounds": [_between(*pair, weight) for pair in pairs]})


def _between(one: float, other: float, weight: float) -> float:
    return one + (other - one) * weight


class PassLengths(Setting):
    """Lengths of passes that are faster than shorter ones, as measured for so many rows on the search's device.

    Args:
        rows: how many are decoded together.
        target: how many tokens a pass of the full model over 1, 2, ... tokens is made of; longer ones of what they are.
        draft: how many tokens a draft's pass over one token is made of.
    """

    rows: Annotated[int, Field(ge=1)]
    target: list[Annotated[int, Field(ge=1, le=2 * MOST_DRAFTED)]]
    draft: Annotated[int, Field(ge=1, le=2 * MOST_DRAFTED)] = 1

    @model_validator(mode="after")
    def _never_cuts(self) -> Self:
        if any(padded < t for t, padded in enumerate(self.target, start=1)):
            raise ValueError("a pass cannot be padded to fewer tokens than it has")
        return self

    def of_target(self, t: int) -> int:
        return self.target[t - 1] if t <= len(self.target) else t

    @property
    def most(self) -> int:
        """How many tokens it may add to a pass."""
        return max(self.draft - 1, *(padded - t for t, padded in enumerate(self.target, start=1)), 0)
