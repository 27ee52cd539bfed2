"""Peers: Hugging Face's decoders in one cell of one row."""

from __future__ import annotations

from typing import Any

from common.timing import decode_seconds

from selfspec import SkipSet
from selfspec.benchmark.contenders import EARLY_EXIT, GENERATE, EarlyExit, HuggingFace, fastest
from shapes.agreement import PROJECTIONS
from shapes.effort import Effort
from shapes.skip_cells import BASIS, PROBING, Cell, CellBench
from shapes.subject import Subject

DRAFT_TOKENS = (3, 6)


def measure_peers(subject: Subject, cell: Cell, effort: Effort, ours_tokens_per_second: float) -> dict[str, Any]:
    """Tokens per second of `model.generate` and `assistant_early_exit`, without prefill.

    An early exit of random weights agrees by chance only, so its agreement is set too, by scaling the sub-layers after
    the exit. The exit skips as many sub-layers as our draft, and drafts the faster of two draft lengths.
    """
    bench = CellBench(subject, cell, effort)
    prompts = [batch[0] for batch in bench.batches[:1]]
    exit_layer = subject.num_layers - len(subject.skip_set) // len(PROJECTIONS)
    skipped = SkipSet.early_exit(exit_layer, subject.num_layers)
    _, agreement = bench.set_agreement(subject.drafting(skipped, PROBING))
    exits = [EarlyExit(subject.model, exit_layer, n) for n in DRAFT_TOKENS]
    peers = {
        GENERATE: HuggingFace(GENERATE, subject.model),
        EARLY_EXIT: fastest(exits, prompts, effort.peer_tokens),
    }
    seconds = decode_seconds(
        {name: lambda n, peer=peer: [peer.decode(prompt, n) for prompt in prompts] for name, peer in peers.items()},
        subject.device,
        new_tokens=effort.peer_tokens,
        repeats=effort.repeats,
    )
    return {
        "cell": str(cell),
        "basis": BASIS,
        "early_exit_agreement": agreement,
        "early_exit_settings": peers[EARLY_EXIT].settings,
        "tokens_per_second": {name: 1 / value for name, value in seconds.items()},
        "ours_over": {name: ours_tokens_per_second * value for name, value in seconds.items()},
    }
