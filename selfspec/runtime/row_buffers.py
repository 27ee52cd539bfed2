"""RowBuffers: what a round reads and writes of its rows on the device, beside the KV cache."""

from __future__ import annotations

import torch

STOP_TOKENS = 16
"""So many stop tokens fit into buffers that outlive a request."""


class RowBuffers:
    """Tensors whose addresses stay, so that captured work serves one request after another.

    Attributes:
        sequences: `b w`, left-padded prompts, then what was committed, then room for a draft.
        pads: `b`, how many tokens of padding each prompt has.
        ends: `b`, committed tokens of each row, padding included.
        finished: `b`, rows that no longer commit.
        found: `b`, how many tokens prompt lookup wrote behind `ends` for the next round.
        matched: `b`, how many of a row's last tokens stand where these were found.
        limit: where every row ends at the latest, padding included; a single number.
        stop_tokens: any one of them ends a row; -1, which no token is, where there are fewer.
    """

    def __init__(self, rows: int, width: int, device: torch.device, stop_tokens: int = STOP_TOKENS) -> None:
        def numbers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        self.sequences = numbers(rows, width)
        self.pads, self.ends = numbers(rows), numbers(rows)
        self.found, self.matched = numbers(rows), numbers(rows)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.limit = numbers()
        self.stop_tokens = numbers(max(1, stop_tokens))
