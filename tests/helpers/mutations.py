"""Damaged inputs, made from valid ones by a seeded generator; and limits on what reading them may take."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

from selfspec.errors import SelfspecError, printable

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-300, 1e300, 2**31, 2**63, 2**64, -(2**63), 10**40, 10**400),
    *("", "x", "NaN", "\x1b[31m\n\r", "\u202e\ud800", "0", "-1", "y" * 5000, "../x", "auto", "é" * 50),
    *([], [[]], [None], [-1], [0] * 3000, {}, {"": 0}, {"self": 1}, {"attn": 3}, float("nan"), float("inf")),
]
"""Values where others belong."""
SECONDS, BYTES = 20, 2**31
"""The most that reading one input may take. An input takes milliseconds; the machine may be busy."""


def count(default: int) -> int:
    """How many inputs a test makes: `default`, or `SELFSPEC_FUZZ`."""
    return int(os.environ.get("SELFSPEC_FUZZ", default))


def seed() -> int:
    return int(os.environ.get("SELFSPEC_FUZZ_SEED", 0))


def mutants(valid: Any, number: int) -> Iterator[tuple[int, bytes]]:
    """`number` texts that were JSON of `valid` once, each with the number of its seed."""
    for index in range(seed() * 10**6, seed() * 10**6 + number):
        random = Random(index)
        data = deepcopy(valid)
        if random.random() < 0.75:
            for _ in range(random.randint(1, 3)):
                data = mutate(data, random)
        text = json.dumps(data).encode()
        yield index, text if random.random() < 0.75 else mutate_bytes(text, random)


def mutate(data: Any, random: Random) -> Any:
    """`data` with one change somewhere: a value deleted, added, exchanged, nested or repeated."""
    containers = [part for part in _parts(data) if isinstance(part, dict | list) and part]
    if not containers:
        return deepcopy(random.choice(ODD))
    container = random.choice(containers)
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    key = random.choice(keys)
    match random.randrange(6):
        case 0:
            del container[key]
        case 1 | 2:
            container[key] = deepcopy(random.choice(ODD))
        case 3:
            for _ in range(random.choice((1, 5, 30, 300))):
                container[key] = random.choice(([container[key]], {"x": container[key]}))
        case 4 if isinstance(container, dict):
            container[random.choice(("self", "x", "", "\x1b[0m", str(key) + "s"))] = deepcopy(random.choice(ODD))
        case 4:
            container.extend(container * random.choice((1, 100)))
        case _:
            other = random.choice(keys)
            container[key], container[other] = container[other], container[key]
    return data


def _parts(data: Any) -> Iterator[Any]:
    yield data
    if isinstance(data, dict | list):
        for part in data.values() if isinstance(data, dict) else data:
            yield from _parts(part)


def mutate_bytes(text: bytes, random: Random) -> bytes:
    """The text cut, with bytes changed, with a stretch repeated, or with something put in."""
    start, end = sorted((random.randrange(len(text) + 1), random.randrange(len(text) + 1)))
    match random.randrange(5):
        case 0:
            return text[:start]
        case 1:
            return text[:start] + text[end:]
        case 2:
            return text[:end] + text[start:]
        case 3:
            return (
                text[:start]
                + random.choice((b"\0", b"\xff\xfe", b"{" * 3000, b"9" * 6000, b"NaN", b"\n", b'"'))
                + text[start:]
            )
        case _:
            changed = bytearray(text)
            for _ in range(random.randint(1, 8)):
                changed[random.randrange(len(changed))] = random.randrange(256)
            return bytes(changed)


@contextmanager
def bounded() -> Iterator[None]:
    """Fail if the block takes more than `SECONDS` or `BYTES`."""

    def fail(*_: object) -> None:
        raise AssertionError(f"more than {SECONDS} seconds")

    before, usual = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, fail)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)


def read(reader: Callable[[], object], name: object) -> str | None:
    """What `reader` was refused with, checked to be one short line; None if it succeeded."""
    try:
        with bounded():
            reader()
    except SelfspecError as error:
        message = str(error)
    except BaseException as error:
        raise AssertionError(f"input {name}: {type(error).__name__}: {error}"[:600]) from error
    else:
        return None
    assert printable(message) == message, name
    assert 0 < len(message) < 1000, name
    return message
