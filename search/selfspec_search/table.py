"""Table: what a replay found at every start and depth; the rounds of every gamma and threshold follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from selfspec_search.texts import Text

NEVER = 2**15
"""A depth that no draft reaches."""


@dataclass(frozen=True, eq=False)
class Table:
    """Agreement and confidence by text, start and depth (`b s n`).

    A start is the number of tokens written when a round begins. `agreed` is False and `confidence` NaN where nothing
    was replayed: behind a token that did not agree, and behind the text's end.
    """

    agreed: NDArray[np.bool_]  # b s n
    confidence: NDArray[np.float32]  # b s n, the largest softmax of the draft's raw logits
    written: NDArray[np.int64]  # b, tokens in each text
    allowed: NDArray[np.int64]  # b, tokens that its request allowed

    @classmethod
    def empty(cls, texts: Sequence[Text], depths: int) -> Table:
        written = np.array([text.written for text in texts])
        shape = (len(texts), int(written.max()), depths)
        return cls(
            agreed=np.zeros(shape, dtype=np.bool_),
            confidence=np.full(shape, np.nan, dtype=np.float32),
            written=written,
            allowed=np.array([text.allowed for text in texts]),
        )

    def note(self, texts: Tensor, starts: Tensor, depth: int, agreed: Tensor, confidence: Tensor) -> None:
        """Enter one depth of some starts, all `a`."""
        rows, columns = texts.numpy(force=True), starts.numpy(force=True)
        self.agreed[rows, columns, depth] = agreed.numpy(force=True)
        self.confidence[rows, columns, depth] = confidence.numpy(force=True)

    def from_first_depth(self) -> Table:
        """An estimate of the whole table: a token drafted at depth d fares as if its round had begun right before it.

        Depth 0 knows every token of the text; that the d tokens before it came from the draft changes little.
        """
        agreed, confidence = np.zeros_like(self.agreed), np.full_like(self.confidence, np.nan)
        for depth in range(min(self.depths, self.agreed.shape[1])):
            until = self.agreed.shape[1] - depth
            agreed[:, :until, depth] = self.agreed[:, depth:, 0]
            confidence[:, :until, depth] = self.confidence[:, depth:, 0]
        on_path = np.cumprod(np.pad(agreed, ((0, 0), (0, 0), (1, 0)), constant_values=True), axis=2)[..., :-1] > 0
        confidence[~on_path] = np.nan
        return Table(agreed & on_path, confidence, self.written, self.allowed)

    def shallow(self, depths: int) -> Table:
        """The first `depths` depths."""
        return Table(self.agreed[..., :depths], self.confidence[..., :depths], self.written, self.allowed)

    @property
    def texts(self) -> int:
        return int(self.agreed.shape[0])

    @property
    def depths(self) -> int:
        return int(self.agreed.shape[2])

    @cached_property
    def runs(self) -> NDArray[np.int64]:
        """How many drafted tokens agree before one does not, `b s`."""
        runs: NDArray[np.int64] = np.cumprod(self.agreed, axis=2).sum(axis=2, dtype=np.int64)
        return runs

    @property
    def agreement(self) -> float:
        """The share of starts whose first drafted token agrees."""
        drafted = ~np.isnan(self.confidence[..., 0])
        return float(self.agreed[..., 0][drafted].mean()) if drafted.any() else 0.0

    def thresholds(self, count: int) -> list[float]:
        """Exit thresholds worth trying: midway between observed confidences, at `count` quantiles of them."""
        observed = np.unique(self.confidence[~np.isnan(self.confidence)])
        if len(observed) < 2 or count < 1:
            return []
        places = np.linspace(0, len(observed) - 1, count + 2)[1:-1].astype(int)
        midways = (observed[places].astype(float) + observed[np.minimum(places + 1, len(observed) - 1)]) / 2
        return sorted({float(x) for x in midways if 0 < x < 1})

    def stops(self, threshold: float | None) -> NDArray[np.int64]:
        """The first depth on the path at which the draft stops for want of confidence, `b s`; `NEVER` if none."""
        if threshold is None:
            return np.full(self.runs.shape, NEVER)
        low = self.confidence < threshold  # False for NaN
        return np.where(low.any(axis=2), low.argmax(axis=2), NEVER)

    def hazard(self, threshold: float | None) -> float:
        """The share of the draft's steps on the path that end it for want of confidence."""
        if threshold is None:
            return 0.0
        observed = self.confidence[~np.isnan(self.confidence)]
        return float((observed < threshold).mean()) if len(observed) else 0.0
