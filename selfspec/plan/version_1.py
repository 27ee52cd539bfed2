"""Reads plan files of version 1: renames their parts, and warns about parts that no longer exist."""

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
"""Dotted keys of version 1 that no longer exist. `*` matches every entry of a list."""


def read_version_1(data: dict[str, Any], source: str) -> dict[str, Any]:
    """Convert a plan file's content from version 1 to version 2. Does not change `data`.

    Version 2 holds all round costs in one list (version 1: `outlook` and `other_rows`), and `padding` became
    `pass_lengths`.
    """
    data = {**without_retired_parts(data, source), "selfspec_version": 2}
    first, others = data.pop("outlook", None), data.pop("other_rows", None) or []
    if first is not None:
        every = [first, *others] if isinstance(others, list) else [first, others]
        data["round_costs"] = [_renamed(one, "looking", "lookup") for one in every]
    if "padding" in data:
        data["pass_lengths"] = data.pop("padding")
    return data


def _renamed(part: Any, old: str, new: str) -> Any:
    """`part` with a key renamed. A part that is not a dictionary stays unchanged: the plan refuses the part."""
    if not isinstance(part, dict):
        return part
    return {new if key == old else key: value for key, value in part.items()}


def without_retired_parts(data: dict[str, Any], source: str) -> dict[str, Any]:
    """A plan file's content without retired parts. Does not change `data`.

    One warning names every retired part that was on. Parts that were off are dropped silently.
    """
    dropped: list[str] = []
    for key in RETIRED:
        data, was_on = _without(data, key.split("."))
        if was_on:
            dropped.append(key)
    if dropped:
        parts = ", ".join(dropped)
        warnings.warn(f"{source} has parts that no longer exist and are ignored: {parts}", PlanWarning, 4)
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
