"""RowBuffers: the device tensors of a batch that rounds read and write, in addition to the KV cache."""

from __future__ import annotations

import torch

STOP_TOKENS = 16
"""Tokens: the number of stop tokens that the buffers of captured rounds hold."""


class RowBuffers:
    """Tensors with fixed addresses, so that a captured round serves one request after another.

    Attributes:
        sequences: `b w`, each row's left-padded prompt, then committed tokens, then room for a draft.
        pads: `b`, pad tokens of each prompt.
        ends: `b`, prompt and committed tokens of each row, including the padding.
        finished: `b`, whether the row is finished.
        found: `b`, tokens that prompt lookup wrote after `ends` for the next round.
        matched: `b`, length of the match that prompt lookup found.
        limit: a scalar: the largest `ends` that a row may reach, including the padding.
        stop_tokens: tokens that end a row; unused entries are -1, which is no token.
    """

    def __init__(self, rows: int, width: int, device: torch.device, stop_tokens: int = STOP_TOKENS) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        self.sequences = zeros(rows, width)
        self.pads, self.ends = zeros(rows), zeros(rows)
        self.found, self.matched = zeros(rows), zeros(rows)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.limit = zeros()
        self.stop_tokens = zeros(max(1, stop_tokens))

    def widen(self, width: int) -> None:
        """Give `sequences` at least `width` columns; the other tensors keep their addresses."""
        if (missing := width - self.sequences.shape[1]) > 0:
            self.sequences = torch.nn.functional.pad(self.sequences, (0, missing))
