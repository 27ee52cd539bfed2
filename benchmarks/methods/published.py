"""Published: the methods that our search is compared with, by name."""

from __future__ import annotations

from methods.clasp import clasp
from methods.context import Select
from methods.draft_verify import draft_verify
from methods.fixed import early_exit, stride
from methods.knapspec import knapspec
from methods.swift import swift

METHODS: dict[str, Select] = {
    "stride": stride,
    "early exit": early_exit,
    "SWIFT": swift,
    "CLaSp": clasp,
    "KnapSpec": knapspec,
    "Draft & Verify": draft_verify,
}
