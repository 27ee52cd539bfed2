"""The loop: draft, verify, accept, commit, rewind; and the one read of a round."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfspec.decoding.acceptance import Draft, accept
from selfspec.decoding.drafter import Drafter
from selfspec.decoding.logits_processors import process
from selfspec.decoding.request import Committed, Request
from selfspec.decoding.stats import Laps, Stats
from selfspec.runtime.prefill import prefill_prompts
from selfspec.runtime.runtime import Runtime
from selfspec.utils.statistics import wait_for


@torch.inference_mode()
def decode(runtime: Runtime, drafter: Drafter, request: Request, stats: Stats) -> Iterator[list[Committed]]:
    """Decode a request, round by round; yields what each round committed in every unfinished row."""
    with stats.timed("total"), stats.timed("prefill"):
        if (unsupported_reason := settle(runtime, drafter, request)) is not None:
            stats.slower_paths.append(f"rounds are not captured: {unsupported_reason}")
        prefill(runtime, request)
        drafter.begin(request)
        look_ahead(drafter, request)
        wait_for(request.sequences.device)  # so that its time is its own
    while not request.is_done():
        with stats.timed("total"):
            committed = step(runtime, drafter, request, stats)
        yield committed


def settle(runtime: Runtime, drafter: Drafter, request: Request) -> str | None:
    """Let the request begin where captured work finds it; or, where its rounds cannot be captured, say why."""
    if runtime.graphs is None:
        return None
    unsupported_reason = drafter.uncaptured_reason or request.uncaptured_reason()
    if unsupported_reason is None:
        request.begin_captured_in(runtime.row_buffers)
    return unsupported_reason


def look_ahead(drafter: Drafter, request: Request) -> None:
    """Let the drafter look at the prompts, as it looks at every later text at the end of a round."""
    looked = drafter.look(request)
    if looked is not None:
        drafter.receive(read(looked))


def step(runtime: Runtime, drafter: Drafter, request: Request, stats: Stats) -> list[Committed]:
    """One round. What happens on the device is in two stretches that never read it, each of them captured as one CUDA
    graph where that is possible; then the host reads once."""
    laps = Laps(request.sequences.device)
    part, n = drafter.choose(request)
    laps.mark()
    draft = run_draft(runtime, part, request, n)
    laps.mark()
    checked = run_check(runtime, drafter, request, draft)
    laps.mark()
    host_values = read(checked.host_values)
    committed = request.take([row[: checked.width] for row in host_values], checked.scores, checked.logits)
    for row in committed:
        row.origin = part.origin(row.row)
    stats.count_choice(part.label, draft.steps, draft.width + 1)
    stats.count_pass(committed)
    stats.add_laps(laps)
    drafter.observe(committed)
    if drafter.looks:
        drafter.receive([row[checked.width :] for row in host_values])
    return committed


def run_draft(runtime: Runtime, part: Drafter, request: Request, n: int) -> Draft:
    """Up to `n` tokens drafted by `part`; where every length of a pass costs a compilation or a capture, in as many
    columns as it drafts at most."""
    width = part.gamma if runtime.static else n
    if is_captured(runtime, request):
        n = width  # a graph for every length would be too many
    key = ("draft", part.key, width)

    def work() -> Draft:
        made = part.draft(request, n)
        return made.padded(width) if runtime.static else made  # one that ended early needs a shorter pass

    draft: Draft = _run(runtime, request, key, work)
    return draft


def run_check(runtime: Runtime, drafter: Drafter, request: Request, draft: Draft) -> Checked:
    """The check of a draft, after which `drafter` looks at what was committed."""
    # A graph reads the draft where it lay when the graph was captured, so it serves drafts that lie there.
    key = ("check", drafter.key, draft.width, draft.addresses)
    checked: Checked = _run(runtime, request, key, lambda: check(runtime, drafter, request, draft))
    return checked


@dataclass(frozen=True)
class Checked:
    """What a check leaves: what the host must be told, `b m`, the first `width` columns of it by the request and the
    others by the drafter; processed and raw target logits, `b n+1 v`."""

    host_values: Tensor
    width: int
    scores: Tensor
    logits: Tensor


def check(runtime: Runtime, drafter: Drafter, request: Request, draft: Draft) -> Checked:
    """Verify, accept, commit and rewind; then the drafter looks at what is there now. Never reads the device."""
    tokens = torch.cat([request.last_tokens()[:, None], draft.tokens], dim=1)  # b n+1
    logits = runtime.run("target", tokens)  # b n+1 v
    ends = request.ends[:, None] + torch.arange(draft.width + 1, device=logits.device)
    scores = process(request.processors, logits, request.sequences, ends)
    host_values = request.commit(draft, accept(draft, scores, sampling=request.sampling), scores)
    # Rewind: every row's cache again holds its committed tokens but the last one.
    runtime.cache.lengths.copy_(request.ends - request.pads - 1)
    looked = drafter.look(request)
    return Checked(
        host_values if looked is None else torch.cat([host_values, looked], dim=1), host_values.shape[1], scores, logits
    )


def read(host_values: Tensor) -> list[list[int]]:
    """The one read of a round: everything that the host must know, in one copy."""
    if host_values.device.type != "cuda":
        return host_values.tolist()  # type: ignore[no-any-return]
    pinned = torch.empty_like(host_values, device="cpu", pin_memory=True)
    pinned.copy_(host_values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(host_values.device))  # which need not be the current device's
    copied.synchronize()
    return pinned.tolist()  # type: ignore[no-any-return]


def is_captured(runtime: Runtime, request: Request) -> bool:
    """Whether the request lives in the buffers that captured work knows."""
    graphs = runtime.graphs
    return graphs is not None and graphs.uncaptured_reason is None and request.buffers is runtime.row_buffers


def _run(runtime: Runtime, request: Request, key: Hashable, work: Callable[[], Any]) -> Any:
    """Do a stretch of device work, as a graph if the request is captured."""
    if runtime.graphs is None or not is_captured(runtime, request):
        return work()
    return runtime.graphs.run((key, request.capture_key), work)


def prefill(runtime: Runtime, request: Request) -> None:
    """Cache all of each prompt but its last token; ragged prompts lose their padding here."""
    prefill_prompts(runtime, request.prompts, request.pads)
