"""Committed: the tokens that a round added to a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Origin = Literal["lookup", "layers", "draft model"]
"""The drafter that drafted in a row."""


@dataclass
class Committed:
    """The tokens that one round committed in one row.

    Attributes:
        row: the row's index in the batch.
        start: where the tokens begin in the row, padding included.
        tokens: the accepted tokens, then the recovered or bonus token.
        drafted: how many tokens were drafted.
        accepted: how many drafted tokens were accepted, all within `tokens`.
        origin: the drafter; None if nothing could draft.
    """

    row: int
    start: int
    tokens: list[int]
    drafted: int
    accepted: int
    origin: Origin | None = None
