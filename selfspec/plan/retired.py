"""Plans of earlier releases: parts that no longer exist are dropped, and one warning names them."""

from __future__ import annotations

import warnings
from typing import Any

from selfspec.errors import PlanWarning

RETIRED: tuple[str, ...] = (
    "resume",
    "prompt_lookup.checked",
    "tree",
    "outlook.branching",
    "outlook.rescued",
    "other_rows.*.branching",
    "other_rows.*.rescued",
    "provenance.profile",
)
"""Dotted keys of parts that earlier releases wrote into plan files. A `*` stands for every entry of a list."""


def without_retired_parts(data: dict[str, Any], source: str) -> dict[str, Any]:
    """A plan file's content without its retired parts; `data` stays as it is.

    Warns once, naming every retired part that changed how the plan drafts. A part that was off is dropped silently.
    """
    dropped: list[str] = []
    for key in RETIRED:
        data, was_on = _without(data, key.split("."))
        if was_on:
            dropped.append(key)
    if dropped:
        parts = ", ".join(dropped)
        warnings.warn(f"{source} has parts that no longer exist, and they are ignored: {parts}", PlanWarning, 3)
    return data


def _without(data: Any, path: list[str]) -> tuple[Any, bool]:
    """`data` without the part at `path`, and whether the part was there and on."""
    name, *rest = path
    if name == "*" and isinstance(data, list):
        entries = [_without(entry, rest) for entry in data]
        return [entry for entry, _ in entries], any(was_on for _, was_on in entries)
    if not isinstance(data, dict) or name not in data:
        return data, False
    if not rest:
        return {key: value for key, value in data.items() if key != name}, bool(data[name])
    inner, was_on = _without(data[name], rest)
    return {**data, name: inner}, was_on
