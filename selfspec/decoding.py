"""The loop: draft, verify, accept, commit, rewind."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from selfspec.drafting import Drafter
from selfspec.processors import process
from selfspec.request import Committed, Request
from selfspec.runtime import Runtime
from selfspec.sampling import accept
from selfspec.stats import Stats


@torch.inference_mode()
def decode(runtime: Runtime, drafter: Drafter, request: Request, stats: Stats) -> Iterator[list[Committed]]:
    """Decode a request, round by round; yields what each round committed in every unfinished row."""
    with stats.timed("total"), stats.timed("prefill"):
        prefill(runtime, request)
    while not request.is_done():
        with stats.timed("total"):
            committed = step(runtime, drafter, request, stats)
        yield committed


def step(runtime: Runtime, drafter: Drafter, request: Request, stats: Stats) -> list[Committed]:
    """One round."""
    with stats.timed("draft"):
        draft = drafter.draft(request)
    if runtime.compile:
        draft = draft.padded(drafter.gamma)  # one pass length, compiled once
    n = draft.tokens.shape[1]
    with stats.timed("verify"):
        logits = runtime.run("target", torch.cat([request.last_tokens()[:, None], draft.tokens], dim=1))  # b n+1 v
    ends = request.ends[:, None] + torch.arange(n + 1, device=logits.device)
    scores = process(request.processors, logits, request.sequences, ends)
    committed = request.commit(draft, accept(draft, scores, sampling=request.sampling), scores, logits)
    # Rewind: every row's cache again holds its committed tokens but the last one.
    runtime.cache.lengths.copy_(request.ends - request.pads - 1)
    stats.count_pass([(row.row, row.drafted, row.accepted, len(row.tokens)) for row in committed])
    return committed


def prefill(runtime: Runtime, request: Request) -> None:
    """Cache all of each prompt but its last token; ragged prompts lose their padding here."""
    b, width = request.prompts.shape
    lengths = width - request.pads  # b
    runtime.pin_longrope(int(lengths.max()))
    columns = torch.arange(int(lengths.max()) - 1, device=request.prompts.device)
    # Row r's tokens start behind its padding; what lies beyond its last one is never seen.
    compact = request.prompts.gather(1, (columns + request.pads[:, None]).clamp(max=width - 1).expand(b, -1))
    runtime.prefill(compact, lengths - 1)
