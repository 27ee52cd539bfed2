"""Reads plan files of version 1: renames their parts, and warns about parts that no longer exist."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

from selfspec.errors import PlanWarning, printable

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
    `pass_lengths`. One warning names every retired part that was on. Parts that were off are dropped silently.
    """
    data = deepcopy(data) | {"selfspec_version": 2}
    if ignored := [key for key in RETIRED if _remove(data, key.split("."))]:
        parts = ", ".join(ignored)
        warnings.warn(f"{printable(source)} has parts that no longer exist and are ignored: {parts}", PlanWarning, 3)
    first, others = data.pop("outlook", None), data.pop("other_rows", None) or []
    if first is not None:
        data["round_costs"] = [first, *others] if isinstance(others, list) else [first, others]
        for costs in data["round_costs"]:
            if isinstance(costs, dict) and "looking" in costs:  # the plan refuses costs that are not a dictionary
                costs["lookup"] = costs.pop("looking")
    if "padding" in data:
        data["pass_lengths"] = data.pop("padding")
    return data


def _remove(part: Any, path: list[str]) -> bool:
    """Remove what is at `path`, and return whether any removed part was on."""
    name, *rest = path
    if name == "*" and isinstance(part, list):
        removed = [_remove(entry, rest) for entry in part]
        return any(removed)
    if not isinstance(part, dict) or name not in part:
        return False
    return _remove(part[name], rest) if rest else bool(part.pop(name))
