"""One round: draft, verify, accept, commit, rewind; and the loop of rounds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfspec.decoding.acceptance import Committed, Draft, accept
from selfspec.decoding.drafter import Drafter
from selfspec.decoding.logits_processors import process
from selfspec.decoding.request import Request
from selfspec.decoding.stats import DeviceTimer, Stats
from selfspec.runtime.prefill import prefill_prompts
from selfspec.runtime.runtime import Runtime
from selfspec.utils.devices import without_autocast
from selfspec.utils.statistics import wait_for


@torch.inference_mode()
def decode(runtime: Runtime, drafter: Drafter, request: Request, stats: Stats) -> Iterator[list[Committed]]:
    """Decode a request round by round; yields what each round committed in every unfinished row."""
    device = request.sequences.device
    # The context of a stream's consumer is not the context in which the stream began.
    with without_autocast(device), stats.timed("total"), stats.timed("prefill"):
        if (reason := bind_buffers(runtime, drafter, request)) is not None:
            stats.slower_paths.append(f"rounds are not captured: {reason}")
        if runtime.unsafe_tokens is not None:  # the last request may have ended with such a token
            runtime.zero_cache()
        prefill_prompts(runtime, request.prompts, request.pads)  # all of each prompt but its last token
        drafter.begin(request)
        if (looked := drafter.look(request)) is not None:
            drafter.receive(read(looked))
        wait_for(device)  # else the first round's time would include the prefill
    while not request.is_done():
        with without_autocast(device), stats.timed("total"):
            make_room(runtime, request)
            committed = step(runtime, drafter, request, stats)
        yield committed


def make_room(runtime: Runtime, request: Request) -> None:
    """Grow the cache and the request's buffers if the next round might not fit."""
    if request.reach > min(runtime.capacity, request.sequences.shape[1]):
        runtime.grow(request.wider())
        request.buffers.widen(request.wider())


def step(runtime: Runtime, drafter: Drafter, request: Request, stats: Stats) -> list[Committed]:
    """One round: two stretches of device work, `run_draft` and `run_check`, then the host's one read."""
    timer = DeviceTimer(request.sequences.device)
    chosen, n = drafter.choose(request)
    timer.mark()
    draft = run_draft(runtime, chosen, request, n)
    timer.mark()
    checked = run_check(runtime, drafter, request, draft)
    timer.mark()
    host_values = read(checked.host_values)
    committed = request.receive([row[: checked.width] for row in host_values], checked.scores, checked.logits)
    for row in committed:
        row.origin = chosen.origin(row.row)
    stats.count_choice(chosen.label, draft.steps, draft.width + 1)
    stats.count_pass(committed)
    stats.add_times(timer)
    drafter.observe(committed)
    if drafter.looks:
        drafter.receive([row[checked.width :] for row in host_values])
    return committed


def check(runtime: Runtime, drafter: Drafter, request: Request, draft: Draft) -> Checked:
    """Verify, accept, commit and rewind; then the drafter looks at the committed tokens. Never reads the device."""
    scores, logits = verify(runtime, request, draft)
    acceptance = accept(draft, scores, sampling=request.sampling)
    host_values = request.commit(draft, acceptance, scores)
    rewind(runtime, request)
    looked = drafter.look(request)
    both = host_values if looked is None else torch.cat([host_values, looked], dim=1)
    return Checked(both, host_values.shape[1], scores, logits)


def verify(runtime: Runtime, request: Request, draft: Draft) -> tuple[Tensor, Tensor]:
    """Processed and raw target logits, `b n+1 v`, of one pass over the last committed token and the draft."""
    tokens = torch.cat([request.last_tokens()[:, None], draft.tokens], dim=1)  # b n+1
    logits = runtime.run("target", tokens)
    ends = request.ends[:, None] + torch.arange(draft.width + 1, device=logits.device)
    return process(request.processors, logits, request.sequences, ends), logits


def rewind(runtime: Runtime, request: Request) -> None:
    """Every row's cache again holds its committed tokens but the last one."""
    runtime.cache.lengths.copy_(request.ends - request.pads - 1)


@dataclass(frozen=True)
class Checked:
    """The result of a check: values for the host, and target logits."""

    host_values: Tensor  # b m, the first `width` columns for the request, the others for the drafter
    width: int
    scores: Tensor  # b n+1 v, processed
    logits: Tensor  # b n+1 v, raw


def read(host_values: Tensor) -> list[list[int]]:
    """The one read of a round: all values for the host, in one copy."""
    if host_values.device.type != "cuda":
        return host_values.tolist()  # type: ignore[no-any-return]
    pinned = torch.empty_like(host_values, device="cpu", pin_memory=True)
    pinned.copy_(host_values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(host_values.device))  # the current device may be another one
    copied.synchronize()
    return pinned.tolist()  # type: ignore[no-any-return]


# --- Captured work ---


def run_draft(runtime: Runtime, chosen: Drafter, request: Request, n: int) -> Draft:
    """Up to `n` tokens drafted by `chosen`.

    A static runtime compiles or captures every pass length, so its drafts are always padded to `chosen.gamma` columns.
    """
    width = chosen.gamma if runtime.static else n
    if is_captured(runtime, request):
        n = width  # one graph for all draft lengths

    def work() -> Draft:
        draft = chosen.draft(request, n)
        return (draft.padded(width) if runtime.static else draft).safe(runtime.unsafe_tokens)

    draft: Draft = _run(runtime, request, ("draft", chosen.key, width), work)
    return draft


def run_check(runtime: Runtime, drafter: Drafter, request: Request, draft: Draft) -> Checked:
    """The check of a draft. A graph reads the draft at the addresses of its capture, so its key holds them."""
    key = ("check", drafter.key, draft.width, draft.addresses)
    checked: Checked = _run(runtime, request, key, lambda: check(runtime, drafter, request, draft))
    return checked


def bind_buffers(runtime: Runtime, drafter: Drafter, request: Request) -> str | None:
    """Bind the request to the buffers that captured work knows; or return why its rounds cannot be captured."""
    if runtime.graphs is None:
        return None
    reason = drafter.uncaptured_reason or request.uncaptured_reason()
    if reason is None:
        request.bind(runtime.row_buffers, captured=True)
    return reason


def is_captured(runtime: Runtime, request: Request) -> bool:
    """Whether the request is bound to the buffers that captured work knows."""
    graphs = runtime.graphs
    return graphs is not None and graphs.uncaptured_reason is None and request.buffers is runtime.row_buffers


def _run(runtime: Runtime, request: Request, key: Hashable, work: Callable[[], Any]) -> Any:
    """Do a stretch of device work, as a graph if the request is captured."""
    if runtime.graphs is None or not is_captured(runtime, request):
        return work()
    return runtime.graphs.run((key, request.capture_key), work)
