"""Formatting and parsing of sizes in bytes, and parsing of durations."""

from __future__ import annotations

from selfspec.errors import InputError

_SECONDS = {"s": 1, "m": 60, "h": 3600}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def in_words(size: int) -> str:
    """A size in bytes as text, rounded up, so that the printed size is always enough."""
    unit, name = next(((size_of, name) for name, size_of in reversed(_UNITS.items()) if size >= size_of), (1, ""))
    return f"{-(-size * 10 // unit) / 10:g} {name}{'i' if name else ''}B"


def parse_size(text: str, what: str = "memory") -> int:
    """Bytes: parses '512M', '4G', '1.5GiB' or a plain number; units are powers of 1024."""
    bare = text.strip().upper().removesuffix("B").removesuffix("I")
    number, unit = (bare[:-1], bare[-1]) if bare[-1:] in _UNITS and bare[-1:] else (bare, "")
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise InputError(f"{what} is '{text}', but a size such as 512M or 4G is expected")
    return size


def parse_duration(text: str, what: str = "duration") -> float:
    """Seconds: parses '90s', '5m', '1.5h' or a plain number of seconds."""
    bare = text.strip().lower()
    number, unit = (bare[:-1], bare[-1]) if bare[-1:] in _SECONDS else (bare, "s")
    try:
        seconds = float(number) * _SECONDS[unit]
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"{what} is '{text:.40}', but a duration such as 90s, 10m or 2h is expected")
    return seconds
