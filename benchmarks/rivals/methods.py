"""Methods: every published way of choosing what to skip that ours is held against."""

from __future__ import annotations

from rivals.clasp import clasp
from rivals.context import Select
from rivals.draft_verify import draft_verify
from rivals.fixed import early_exit, stride
from rivals.knapspec import knapspec
from rivals.swift import swift

METHODS: dict[str, Select] = {
    "stride": stride,
    "early exit": early_exit,
    "SWIFT": swift,
    "CLaSp": clasp,
    "KnapSpec": knapspec,
    "Draft & Verify": draft_verify,
}
"""By the names under which they are reported."""
