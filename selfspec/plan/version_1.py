"""Plan files of version 1: their parts get today's names. One warning names parts that no longer exist."""

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
"""Dotted keys of parts that version 1 knew and no release knows any more. A `*` stands for every entry of a list."""


def read_version_1(data: dict[str, Any], source: str) -> dict[str, Any]:
    """The content of a plan file of version 1, as version 2 has it; `data` stays as it is.

    Version 2 keeps the round costs of every number of rows in one list (version 1: `outlook` and `other_rows`), and
    calls `padding` `pass_lengths`.
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
    """`part` with a key renamed. A part that is not a dictionary is left for the plan to refuse."""
    if not isinstance(part, dict):
        return part
    return {new if key == old else key: value for key, value in part.items()}


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
        warnings.warn(f"{source} has parts that no longer exist, and they are ignored: {parts}", PlanWarning, 4)
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
