"""Formatting and parsing of sizes in bytes."""

from __future__ import annotations

from selfspec.errors import InputError

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
