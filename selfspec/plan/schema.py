"""Base classes of a plan's parts: they refuse unknown keys, and report the first problem in one line."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from selfspec.errors import PlanError, excerpt, shortened
from selfspec.plan.draft_spec import Quantised
from selfspec.plan.sublayers import SkipSet


class Strict(BaseModel):
    """Refuses unknown keys and values of other types. Instances are immutable."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, strict=True, ser_json_inf_nan="constants"
    )


class Setting(Strict):
    """A part of a plan that users also make by hand."""

    def __init__(self, /, **data: Any) -> None:  # a key may be `self`
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise PlanError(first_problem(error, type(self).__name__)) from None

    # With this mark pydantic does not call `__init__` for a part of a plan: the plan reports the part's problems.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def first_problem(error: ValidationError, part: str | None = None) -> str:
    """The first problem of a plan, or of a part made by hand, in one line: the key, the problem, what to do."""
    problem = error.errors()[0]
    where = shortened(".".join(map(str, problem["loc"])))
    message = f"{problem['msg'].removeprefix('Value error, ')} (given: {excerpt(problem['input'])})"
    if problem["type"] == "extra_forbidden":
        unknown = f"plan has an unknown key '{where}'; remove it, or search again"
        return f"{part} takes no '{where}'; leave it out" if part else unknown
    if problem["type"] == "missing":
        return f"{part} lacks '{where}'; add it" if part else f"plan lacks the key '{where}'; search again"
    if part:
        return f"{part}'s {where}: {message}" if where else f"{part}: {message}"
    return f"plan key '{where or 'plan'}': {message}"


def _to_skip_set(value: Any) -> Any:
    return value if isinstance(value, SkipSet) else SkipSet.from_dict(value)


SkipSetField = Annotated[
    SkipSet, BeforeValidator(_to_skip_set), PlainSerializer(SkipSet.to_dict, return_type=dict[str, list[int]])
]


def _to_quantised(value: Any) -> Any:
    return value if isinstance(value, Quantised) or value is None else Quantised.from_dict(value)


QuantisedField = Annotated[
    Quantised | None,
    BeforeValidator(_to_quantised),
    PlainSerializer(lambda value: value and value.to_dict(), return_type=dict[str, Any] | None),
]
