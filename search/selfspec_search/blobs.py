"""Blobs: bytes as a study's attributes, in pieces that every database takes, and whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

BLOB = "blob:"
PIECE = 32_000
"""Characters in a piece: MySQL's text columns hold 65,535 bytes."""


def to_attrs(key: str, data: bytes) -> Iterator[tuple[str, Any]]:
    """Attributes to write in this order: the pieces, and last what they must add up to."""
    text = base64.b64encode(zlib.compress(data)).decode("ascii")
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    for index, piece in enumerate(pieces):
        yield _piece_key(key, index), piece
    yield _marker_key(key), {"sha256": hashlib.sha256(data).hexdigest(), "pieces": len(pieces)}


def from_attrs(key: str, attrs: Mapping[str, Any]) -> bytes | None:
    """The inverse of `to_attrs`; None if the blob is not there, or not yet whole."""
    marker = attrs.get(_marker_key(key))
    if marker is None:
        return None
    pieces = [attrs.get(_piece_key(key, index), "") for index in range(marker["pieces"])]
    try:
        data = zlib.decompress(base64.b64decode("".join(pieces), validate=True))
    except (ValueError, zlib.error):  # pieces of two blobs: one is just being written over the other
        return None
    return data if hashlib.sha256(data).hexdigest() == marker["sha256"] else None


def keys_of(attrs: Mapping[str, Any]) -> list[str]:
    """The keys of all blobs, whole or not."""
    return [name.removeprefix(BLOB) for name in attrs if name.startswith(BLOB) and ":" not in name.removeprefix(BLOB)]


def _piece_key(key: str, index: int) -> str:
    return f"{BLOB}{key}:{index}"


def _marker_key(key: str) -> str:
    return f"{BLOB}{key}"
