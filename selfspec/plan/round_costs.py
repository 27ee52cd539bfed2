"""RoundCosts and PassLengths: measured costs of rounds, and fast pass lengths, on the device of the search."""

from __future__ import annotations

from bisect import bisect_right
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from selfspec.errors import excerpt
from selfspec.plan.lookup import MOST_DRAFTED
from selfspec.plan.schema import Setting

Share = Annotated[float, Field(ge=0, le=1)]
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rows = Annotated[int, Field(ge=1, le=2**20)]

MATCHES = (1, 2, 3, 5, 8)
"""Tokens: the shortest match of each length class of prompt lookup. The last class has no upper limit."""


def match_class(matched: int) -> int:
    """The index of the length class of a match of `matched` tokens."""
    return bisect_right(MATCHES, matched) - 1


class RoundCosts(Setting):
    """Measured costs and agreement of every drafter: where a policy starts.

    Args:
        rows: rows that decode together. All costs are for all rows together.
        draft_step: Seconds: drafting one token in every row.
        rounds: Seconds: a round over 0, 1, ... drafted tokens, without drafting.
        agreement: the agreement of layer skipping, by draft position.
        lookup: Seconds: prompt lookup in one round.
        matches: the agreement of prompt lookup by length class of the match (`MATCHES`): for the first drafted token,
            and for later tokens. Empty without prompt lookup.
    """

    rows: Rows
    draft_step: Cost
    rounds: Annotated[
        list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=2, max_length=MOST_DRAFTED + 1)
    ]
    agreement: Annotated[list[Share], Field(min_length=1, max_length=MOST_DRAFTED)]
    lookup: Cost = 0.0
    matches: list[Annotated[list[Share], Field(min_length=2, max_length=2)]] = Field(
        default_factory=list, max_length=len(MATCHES)
    )

    @model_validator(mode="after")
    def _knows_every_match(self) -> Self:
        if len(self.matches) not in (0, len(MATCHES)):
            raise ValueError(f"matches has {len(self.matches)} entries, but must have {len(MATCHES)} or none")
        return self

    def between(self, other: RoundCosts, rows: int) -> RoundCosts:
        """Round costs for `rows` rows, interpolated between these costs and `other`."""
        weight = (rows - self.rows) / (other.rows - self.rows)
        changed: dict[str, Any] = {"rows": rows}
        for name in ("draft_step", "lookup"):
            changed[name] = _between(getattr(self, name), getattr(other, name), weight)
        pairs = zip(self.rounds, other.rounds, strict=False)
        return self.model_copy(update=changed | {"rounds": [_between(*pair, weight) for pair in pairs]})


def _between(one: float, other: float, weight: float) -> float:
    return one + (other - one) * weight


class PassLengths(Setting):
    """Pass lengths that are faster than shorter passes, measured for `rows` rows on the search's device.

    Args:
        rows: rows that decode together.
        target: Tokens: padded lengths of the target's passes over 1, 2, ... tokens. Longer passes are not padded.
        draft: Tokens: the padded length of the draft's pass over one token.
        gains: by pass, the measurement that shows the gain: the padded pass's speed over the unpadded pass's, and the
            95 % interval of this ratio.
    """

    rows: Rows
    target: Annotated[list[Annotated[int, Field(ge=1, le=2 * MOST_DRAFTED)]], Field(max_length=2 * MOST_DRAFTED)]
    draft: Annotated[int, Field(ge=1, le=2 * MOST_DRAFTED)] = 1
    gains: dict[str, Annotated[list[float], Field(min_length=3, max_length=3)]] | None = None

    @model_validator(mode="after")
    def _never_cuts(self) -> Self:
        if any(padded < t for t, padded in enumerate(self.target, start=1)):
            raise ValueError(f"target is {excerpt(self.target)}, but a pass over t tokens must have at least t")
        return self

    def of_target(self, t: int) -> int:
        """Tokens: the padded length of a target pass over `t` tokens."""
        return self.target[t - 1] if t <= len(self.target) else t

    @property
    def pads_plain(self) -> bool:
        """Whether the passes of plain decoding are padded."""
        return self.of_target(1) > 1

    @property
    def most(self) -> int:
        """Tokens: the most padding of any pass."""
        return max(self.draft - 1, *(padded - t for t, padded in enumerate(self.target, start=1)), 0)
