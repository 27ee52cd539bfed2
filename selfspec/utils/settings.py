"""Described settings: help text and bounds in one place, for the library and the command line.

A settings class is a frozen dataclass. Its fields read `rows: Annotated[int, Described("Rows that decode together.",
least=1)] = 1`. Its `__post_init__` calls `check_settings`. The command line makes an option of each described field.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from selfspec.errors import InputError


@dataclass(frozen=True)
class Described:
    """The help text and the bounds of a setting. Bounds apply to numbers only."""

    help: str
    _: KW_ONLY
    least: float | None = None
    above: float | None = None
    """An exclusive lower bound."""
    most: float | None = None
    unit: str = ""
    """Follows a refused value in error messages."""
    is_size: bool = False
    """Whether the value is in bytes. The command line accepts text such as 4G for bytes."""
    is_duration: bool = False
    """Whether the value is in seconds. The command line accepts text such as 10m for seconds."""

    def complaint(self, value: Any) -> str | None:
        """What is wrong with `value`, without the setting's name; None if the value is within the bounds."""
        if not isinstance(value, (int, float)) or self._holds(value):
            return None
        return f"is {value}{self.unit and ' '}{self.unit}, but it must be {self._range()}"

    def _holds(self, value: float) -> bool:  # false for NaN, for which every comparison fails
        low, high, above = self.least, self.most, self.above
        return (
            (low is None or value >= low)
            and (above is None or value > above)
            and (value <= high if high is not None else value < float("inf"))
        )

    def _range(self) -> str:
        if self.least is not None:
            bytes_ = " byte" if self.is_size else ""
            return f"at least {self.least}{bytes_}" if self.most is None else f"between {self.least} and {self.most}"
        above = "more than" if self.most is None else "above"
        limits = [f"{above} {self.above}"] if self.above is not None else []
        return " and ".join([*limits, "finite" if self.most is None else f"at most {self.most}"])


class SettingError(InputError):
    """A setting has a value that is not allowed. The command line shows `setting` as an option name."""

    def __init__(self, setting: str, reason: str) -> None:
        super().__init__(f"{setting} {reason}")
        self.setting, self.reason = setting, reason


def described(hint: Any) -> Described | None:
    """The `Described` of an annotation; None if the annotation has none."""
    return next((part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Described)), None)


def described_fields(settings: type) -> dict[str, Any]:
    """The annotations of the described fields of a settings class, by name."""
    hints = get_type_hints(settings, include_extras=True)
    return {name: hint for name, hint in hints.items() if described(hint) is not None}


def check_settings(settings: Any) -> None:
    """Check the described fields of a settings object against their bounds and choices.

    Raises:
        SettingError: a value is not allowed.
    """
    for name, hint in described_fields(type(settings)).items():
        check_value(name, getattr(settings, name), hint)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Check the value of one setting against its annotation.

    Raises:
        SettingError: the value is not allowed.
    """
    kind, about = get_args(hint)[0], described(hint)
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise SettingError(name, f"is '{value}', but it must be one of {', '.join(get_args(kind))}")
    if about is not None and (reason := about.complaint(value)) is not None:
        raise SettingError(name, reason)
