"""Table: what a replay found at every start and depth; the rounds of every draft length follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from selfspec_search.replay.texts import Text


@dataclass(frozen=True, eq=False)
class Table:
    """Acceptance by text, start and depth (`b s n`).

    A start is the number of tokens written when a round begins. `weight` is the chance that the text's token was an
    accepted draft, given that those before it in the round were: 0 or 1 for greedy decoding. It is 0 where
    nothing was replayed: behind a token that was not accepted, and behind the text's end.
    """

    weight: NDArray[np.float32]  # b s n
    written: NDArray[np.int64]  # b, tokens in each text
    allowed: NDArray[np.int64]  # b, tokens that its request allowed

    @classmethod
    def empty(cls, texts: Sequence[Text], depths: int) -> Table:
        written = np.array([text.written for text in texts])
        shape = (len(texts), int(written.max()), depths)
        return cls(
            weight=np.zeros(shape, dtype=np.float32),
            written=written,
            allowed=np.array([text.allowed for text in texts]),
        )

    def note(self, texts: Tensor, starts: Tensor, depth: int, weight: Tensor) -> None:
        """Enter one depth of some starts, all `a`."""
        rows, columns = texts.numpy(force=True), starts.numpy(force=True)
        self.weight[rows, columns, depth] = weight.numpy(force=True)

    def from_first_depth(self, depths: int | None = None) -> Table:
        """An estimate of `depths` depths: a token drafted at depth d fares as if its round had begun right before it.

        Depth 0 knows every token of the text; that the d tokens before it came from the draft changes little.
        """
        shape = (*self.weight.shape[:2], depths or self.depths)
        weight = np.zeros(shape, dtype=np.float32)
        for depth in range(min(shape[2], shape[1])):
            until = self.weight.shape[1] - depth
            weight[:, :until, depth] = self.weight[:, depth:, 0]
        estimate = Table(weight, self.written, self.allowed)
        weight[estimate.reach[..., :-1] == 0] = 0
        return estimate

    def extended(self, depths: int) -> Table:
        """With an estimate from the first depth for depths that were not replayed."""
        missing = depths - self.depths
        if missing <= 0:
            return self
        estimate, going = self.from_first_depth(depths), self.reach[..., -1:] > 0
        weight = np.where(going, estimate.weight[..., self.depths :], 0).astype(np.float32)
        return Table(np.concatenate([self.weight, weight], axis=2), self.written, self.allowed)

    def only(self, texts: Sequence[int]) -> Table:
        """Some of the texts."""
        at = list(texts)
        return Table(self.weight[at], self.written[at], self.allowed[at])

    def shallow(self, depths: int) -> Table:
        """The first `depths` depths."""
        return Table(self.weight[..., :depths], self.written, self.allowed)

    @property
    def texts(self) -> int:
        return int(self.weight.shape[0])

    @property
    def depths(self) -> int:
        return int(self.weight.shape[2])

    @cached_property
    def reach(self) -> NDArray[np.float32]:
        """The chance that the first k drafted tokens are all accepted, `b s n+1` for k from 0."""
        certain = np.ones((*self.weight.shape[:2], 1), dtype=np.float32)
        reach: NDArray[np.float32] = np.concatenate([certain, np.cumprod(self.weight, axis=2)], axis=2)
        return reach

    @cached_property
    def is_certain(self) -> bool:
        """Whether every token is either accepted or not, as in greedy decoding."""
        return bool(((self.weight == 0) | (self.weight == 1)).all())

    @property
    def agreement(self) -> float:
        """The share of first drafted tokens that are accepted."""
        ends = np.minimum(self.written, self.allowed - 1)  # the last token allowed is never drafted
        drafted = np.arange(self.weight.shape[1]) < ends[:, None]
        return float(self.weight[..., 0][drafted].mean()) if drafted.any() else 0.0

    def to_bytes(self) -> bytes:
        """Compressed, for a study's storage: chances to three digits or so."""
        file = BytesIO()
        np.savez_compressed(
            file,
            weight=self.weight.astype(np.float16),
            written=self.written,
            allowed=self.allowed,
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Table:
        """The inverse of `to_bytes`, but for rounding: greedy acceptance is exact."""
        with np.load(BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("weight", "written", "allowed")}
        return cls(
            weight=arrays["weight"].astype(np.float32),
            written=arrays["written"],
            allowed=arrays["allowed"],
        )
