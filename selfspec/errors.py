"""Errors that a user can cause and fix, two warnings, how messages quote input, and the test for failed allocations."""

from __future__ import annotations

LONGEST_QUOTE = 80
"""Characters: the longest excerpt of the input in a message."""


def printable(text: object) -> str:
    """The text on one line: what does not print is escaped, so that no input breaks lines or commands the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(text))


def shortened(text: str) -> str:
    """The start of a text of the input, escaped, for messages: at most `LONGEST_QUOTE` characters.

    >>> shortened("x" * 100)[-8:]
    'xxxxx...'
    """
    shown = printable(text[: LONGEST_QUOTE + 1])
    return shown if len(shown) <= LONGEST_QUOTE else shown[: LONGEST_QUOTE - 3] + "..."


def excerpt(value: object) -> str:
    """The start of a value's `repr`, for messages."""
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # an integer of too many digits, or too many levels
        return type(value).__name__


class SelfspecError(Exception):
    """Base class. The message is one line: what was given, what was expected, what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


class PlanError(SelfspecError):
    """A plan or skip set is malformed or does not fit the model."""


class UnsupportedModelError(SelfspecError):
    """The views cannot reproduce the model."""


class UnsupportedOptionError(SelfspecError):
    """Speculative decoding does not support the generation option."""


class InputError(SelfspecError):
    """Prompts, files, tensors or settings cannot be used as given."""


class OutOfMemoryError(SelfspecError, MemoryError):
    """The memory does not suffice for the KV cache of a request."""


class PlanWarning(UserWarning):
    """The plan was searched under other conditions: the output is right, but the plan may not be the fastest here."""


class OptionWarning(UserWarning):
    """An option of the model's own generation config is not supported and was turned off."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an accelerator or a CPU could not allocate memory."""
    messages = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(message in str(error) for message in messages)
