"""Table: acceptance at every start and depth of a replay. The rounds of every draft length follow from the table."""

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

    A start is the number of tokens written when a round begins. `weight` is the probability that the text's token was
    an accepted draft, given that the round accepted all tokens before: 0 or 1 for greedy decoding. `weight` is 0 where
    nothing was replayed: after a token that was not accepted, and after the text's end.
    """

    weight: NDArray[np.float32]  # b s n
    written: NDArray[np.int64]  # b, tokens in each text
    allowed: NDArray[np.int64]  # b, the most tokens that the request allowed

    @classmethod
    def empty(cls, texts: Sequence[Text], depths: int) -> Table:
        written = np.array([text.written for text in texts])
        shape = (len(texts), int(written.max()), depths)
        return cls(np.zeros(shape, dtype=np.float32), written, np.array([text.allowed for text in texts]))

    def note(self, texts: Tensor, starts: Tensor, depth: int, weight: Tensor) -> None:
        """Enter the weights of some starts at one depth; all tensors are `a`."""
        rows, columns = texts.numpy(force=True), starts.numpy(force=True)
        self.weight[rows, columns, depth] = weight.numpy(force=True)

    def from_first_depth(self, depths: int | None = None) -> Table:
        """Estimate `depths` depths: a token at depth d has the weight that a round starting at that token gives.

        Depth 0 was replayed for every token of the text. The keys of the d tokens before would be the draft's own, but
        that changes acceptance little.
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
        """The table with `depths` depths; depths that were not replayed are estimated from the first depth."""
        missing = depths - self.depths
        if missing <= 0:
            return self
        estimate, going = self.from_first_depth(depths), self.reach[..., -1:] > 0
        weight = np.where(going, estimate.weight[..., self.depths :], 0).astype(np.float32)
        return Table(np.concatenate([self.weight, weight], axis=2), self.written, self.allowed)

    def only(self, texts: Sequence[int]) -> Table:
        """The table of some of the texts."""
        at = list(texts)
        return Table(self.weight[at], self.written[at], self.allowed[at])

    def shallow(self, depths: int) -> Table:
        """The table of the first `depths` depths."""
        return Table(self.weight[..., :depths], self.written, self.allowed)

    @property
    def texts(self) -> int:
        return int(self.weight.shape[0])

    @property
    def depths(self) -> int:
        return int(self.weight.shape[2])

    @cached_property
    def reach(self) -> NDArray[np.float32]:
        """The probability that the first k drafted tokens are all accepted, `b s n+1` for k = 0..n."""
        certain = np.ones((*self.weight.shape[:2], 1), dtype=np.float32)
        reach: NDArray[np.float32] = np.concatenate([certain, np.cumprod(self.weight, axis=2)], axis=2)
        return reach

    @cached_property
    def is_certain(self) -> bool:
        """Whether every weight is 0 or 1, as in greedy decoding."""
        return bool(((self.weight == 0) | (self.weight == 1)).all())

    @property
    def agreement(self) -> float:
        """The share of the rounds' first drafted tokens that are accepted."""
        ends = np.minimum(self.written, self.allowed - 1)  # the last token allowed is never drafted
        drafted = np.arange(self.weight.shape[1]) < ends[:, None]
        return float(self.weight[..., 0][drafted].mean()) if drafted.any() else 0.0

    def to_bytes(self) -> bytes:
        """Compressed bytes for a study's storage; weights are rounded to float16."""
        file = BytesIO()
        np.savez_compressed(file, weight=self.weight.astype(np.float16), written=self.written, allowed=self.allowed)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Table:
        """The inverse of `to_bytes`, except for rounding: greedy weights are exact."""
        with np.load(BytesIO(data), allow_pickle=False) as file:
            return cls(file["weight"].astype(np.float32), file["written"], file["allowed"])
