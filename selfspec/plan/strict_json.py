"""Reads JSON text of plan files. Refuses what Python's reader accepts and a plan never holds."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from selfspec.errors import PlanError, excerpt

MOST_LEVELS = 20
"""Levels: the deepest nesting of a plan file. Plans have five levels."""


def parse_strictly(text: str, source: str) -> Any:
    """The JSON value of `text`.

    Raises:
        PlanError: the text is not JSON, repeats a key, holds NaN, infinity or a lone surrogate, or nests deeper than
            `MOST_LEVELS`.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
        if is_deeper(data, MOST_LEVELS):
            raise RecursionError
        json.dumps(data, ensure_ascii=False).encode("utf8")
    except json.JSONDecodeError as error:
        raise PlanError(f"{source} is not JSON ({error.msg} at line {error.lineno}); save the plan again") from None
    except RecursionError:
        raise PlanError(f"{source} nests deeper than {MOST_LEVELS} levels; save the plan again") from None
    except UnicodeEncodeError:
        raise PlanError(f"{source} holds a lone surrogate, which is no character; save the plan again") from None
    except ValueError as error:  # ours, or an integer of too many digits
        raise PlanError(f"{source} is not a plan: {str(error).partition(';')[0]}; save the plan again") from None
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        ((repeated, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {excerpt(repeated)} is given twice")
    return data


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{excerpt(text)} is not a finite number")
    return value


def is_deeper(data: Any, levels: int) -> bool:
    """Whether lists and objects nest deeper than `levels`."""
    level = [data]
    for _ in range(levels + 1):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [item for part in parts for item in part]
    return bool(level)
