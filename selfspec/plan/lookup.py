"""PromptLookup: the plan's settings for drafting by prompt lookup."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from selfspec.plan.draft_spec import MOST_DRAFTED
from selfspec.plan.schema import Setting


class PromptLookup(Setting):
    """Prompt lookup: find the last tokens earlier in the text, and draft up to `gamma` tokens that followed there.

    The longest match of `min_ngram` to `max_ngram` tokens counts.
    """

    gamma: Annotated[int, Field(ge=1, le=MOST_DRAFTED)]
    min_ngram: Annotated[int, Field(ge=1, le=64)] = 2
    max_ngram: Annotated[int, Field(ge=1, le=64)] = 8

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram is {self.min_ngram}, but it must be at most max_ngram, {self.max_ngram}")
        return self

    def __str__(self) -> str:
        return f"lookup of {self.min_ngram} to {self.max_ngram} tokens, {self.gamma} drafted"
