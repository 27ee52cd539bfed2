"""Send the tokens of rounds of unequal length to a Hugging Face streamer."""

from __future__ import annotations

import torch
from transformers.generation.streamers import BaseStreamer

from selfspec.decoding.acceptance import Committed
from selfspec.decoding.request import Request


class Streamed:
    """Sends the prompt, then the tokens `b` of each step as soon as every row has that step."""

    def __init__(self, streamer: BaseStreamer, request: Request) -> None:
        self.streamer, self.request = streamer, request
        self.rows: list[list[int]] = [[] for _ in range(request.rows)]
        self.sent = 0
        streamer.put(request.prompts.cpu())

    def put(self, committed: list[Committed]) -> None:
        for row in committed:
            self.rows[row.row].extend(row.tokens)
        ready = [len(row) for index, row in enumerate(self.rows) if not self.request.has_ended(index)]
        until, pad = min(ready) if ready else max(map(len, self.rows)), self.request.pad_token
        for step in range(self.sent, until):
            tokens = [row[step] if step < len(row) else pad for row in self.rows]
            self.streamer.put(torch.tensor(tokens, device="cpu"))
        self.sent = max(self.sent, until)
