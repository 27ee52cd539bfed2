"""Options that several commands share, and how a command's dataclasses become Typer options.

A command takes dataclasses: `settings: SearchSettings`, `place: Placement`. `with_options` gives it one option for each
of their fields. An option of a settings class has the help text, the default and the bounds of its field.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from selfspec.errors import InputError
from selfspec.utils.settings import SettingError, check_value, described, described_fields
from selfspec.utils.sizes import parse_duration, parse_size

DRAFT_GAMMA = 4
"""Tokens: the default draft length of a draft model."""

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A Hugging Face hub id, a local directory, or 'demo' (the embedded model)."),
]
_plan = typer.Option("--plan", metavar="PLAN", help="A plan file that 'search' wrote, or a directory that holds one.")
PlanFile = Annotated[Path, _plan]
PlanFileOrNone = Annotated[Path | None, _plan]
_prompts = typer.Option(
    "--prompts", metavar="FILE", help="Prompts: text, one a line; or .jsonl with 'prompt' or chat 'messages'."
)
PromptFile = Annotated[Path, _prompts]
PromptFileOrNone = Annotated[Path | None, _prompts]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results.")]

Force = Annotated[bool, typer.Option("--force", help="Overwrite --out even if it is not a plan for this model.")]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The device and the dtype of the model."""

    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is CUDA where there is any.")] = "auto"
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; auto is the checkpoint's own (for 'demo': float32).")
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class DraftModel:
    """A smaller model that drafts."""

    draft_model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A smaller model of the same tokenizer that drafts, named like MODEL."),
    ] = None
    draft_gamma: Annotated[
        int | None, typer.Option(help=f"Tokens that the draft model drafts a round; {DRAFT_GAMMA} by default.", min=1)
    ] = None

    @property
    def gamma(self) -> int:
        """The draft length: the given one, or the default."""
        return self.draft_gamma or DRAFT_GAMMA


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen; greedy without any option."""

    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature; 0 is greedy.")] = None
    top_p: Annotated[float | None, typer.Option(help="Sample from the most likely tokens of this mass.")] = None
    top_k: Annotated[int | None, typer.Option(help="Sample from this many of the most likely tokens.")] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Sample from tokens of at least this share of the likeliest token's probability."),
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Divide the logits of earlier tokens by X.")
    ] = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature >= 0:
            raise InputError(f"--temperature is {self.temperature}, but it must be at least 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p is {self.top_p}, but it must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k is {self.top_k}, but it must be at least 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"--min-p is {self.min_p}, but it must be between 0 and 1")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < float("inf"):
            raise InputError(f"--repetition-penalty is {self.repetition_penalty}, but it must be above 0")

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate`. The model's generation config decides the rest."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        penalty = {name: given.pop(name) for name in ("repetition_penalty",) if name in given}
        if self.temperature == 0 or not given:
            return {"do_sample": False} | penalty
        return {"do_sample": True} | given | penalty


class Without(frozenset[str]):
    """Settings that a command does not offer: `Annotated[DecodeOptions, Without({"graphs"})]`."""


def flag(name: str) -> str:
    """The option of a parameter, as typed on the command line."""
    return "--" + name.replace("_", "-")


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` for Typer: a dataclass parameter becomes one option for each of its fields."""
    hints = get_type_hints(command, include_extras=True)
    options = {name: _options(hints[name], parameter) for name, parameter in signature(command).parameters.items()}

    @wraps(command)
    def run(**given: Any) -> None:
        try:
            command(**{name: _value(hints[name], group, given) for name, group in options.items()})
        except SettingError as error:
            raise InputError(f"{flag(error.setting)} {error.reason}") from None

    parameters = [option for group in options.values() for option in group]
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in parameters}
    return run


def _options(hint: Any, parameter: Parameter) -> list[Parameter]:
    """The options of one parameter of a command."""
    group = _group_of(hint)
    if group is None:
        return [_option(parameter.name, hint, parameter.default)]
    hidden = next((part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Without)), Without())
    hints = described_fields(group) or get_type_hints(group, include_extras=True)
    return [
        _option(field.name, hints[field.name], field.default)
        for field in fields(group)
        if field.name in hints and field.name not in hidden
    ]


def _group_of(hint: Any) -> Any:
    """The dataclass that an annotation names; None for any other type."""
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return kind if is_dataclass(kind) else None


def _option(name: str, hint: Any, default: Any) -> Parameter:
    """The option of a described setting. Other annotations already hold a Typer option."""
    if (about := described(hint)) is not None:
        kind, option = get_args(hint)[0], typer.Option(help=about.help)
        if about.is_size:
            kind, option = int | None, typer.Option(help=about.help, metavar="SIZE", parser=_parser(parse_size, name))
        elif about.is_duration:
            parser = _parser(parse_duration, name)
            kind, option = float | None, typer.Option(help=about.help, metavar="TIME", parser=parser)
        elif get_origin(kind) is Sequence:
            kind = list[get_args(kind)[0]]  # type: ignore[misc]
        hint = Annotated[kind, option]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _value(hint: Any, options: list[Parameter], given: dict[str, Any]) -> Any:
    """The value of one parameter of a command."""
    group, values = _group_of(hint), {option.name: given[option.name] for option in options}
    if group is not None:
        return group(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    ((name, value),) = values.items()
    if described(hint) is not None:
        check_value(name, value, hint)
    return value


def _parser(parse: Callable[[str, str], Any], name: str) -> Callable[[str], Any]:
    def value(text: str) -> Any:
        return parse(text, flag(name))

    return value
