"""PromptLookup and Tree: what a plan drafts beside the layers' own guesses."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from selfspec.plan.schema import Setting
from selfspec.recipe import MOST_DRAFTED

MOST_SIBLINGS = 16
"""The most alternatives to drafted tokens."""


class PromptLookup(Setting):
    """Prompt lookup: draft up to `gamma` tokens that followed an earlier match of `min_ngram` last tokens or more.

    The longest match counts, of up to `max_ngram` tokens. `checked`: the draft checks them before the target does.
    """

    gamma: Annotated[int, Field(ge=1, le=MOST_DRAFTED)]
    min_ngram: Annotated[int, Field(ge=1, le=64)] = 2
    max_ngram: Annotated[int, Field(ge=1, le=64)] = 8
    checked: bool = False

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram is {self.min_ngram}, but it must be at most max_ngram, {self.max_ngram}")
        return self

    def __str__(self) -> str:
        checked = ", checked by the draft" if self.checked else ""
        return f"lookup of {self.min_ngram} to {self.max_ngram} tokens, {self.gamma} drafted{checked}"


class Tree(Setting):
    """Draft alternatives, too: `siblings` of them in each row, beside the drafted tokens of which the draft is least
    sure; at one position it tries `width` tokens at most, the drafted one included.
    """

    siblings: Annotated[int, Field(ge=1, le=MOST_SIBLINGS)]
    width: Annotated[int, Field(ge=2, le=MOST_SIBLINGS + 1)] = 3

    def __str__(self) -> str:
        return f"{self.siblings} sibling{'s' if self.siblings > 1 else ''}, up to {self.width} tokens a position"
