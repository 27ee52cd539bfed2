"""Replay stays within its memory budget. The budget changes the time of a replay, not its table."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import selfspec_search.replay.replay
import torch
from models import ENDS_SKIPPED, damped_model
from replays import DEPTHS, LENGTHS, NEW_TOKENS, SAMPLING, llama_runtime, llama_texts, random_prompts, texts_of
from selfspec_search.replay.memory import Memory
from selfspec_search.replay.recording import batches, probabilities
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.sampling_settings import Sampling
from selfspec_search.replay.texts import Text
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfspec import SkipSet
from selfspec.errors import InputError
from selfspec.models.views import target_view
from selfspec.runtime.runtime import Runtime
from selfspec.utils.sizes import parse_size


@pytest.mark.parametrize("threads", [1, 2])
def test_small_memory_changes_the_time_and_not_the_table(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(selfspec_search.replay.replay, "threads_for", lambda device: threads)
    runtime, texts = llama_texts()
    whole = Replay(runtime.model, texts, DEPTHS)
    need = Memory(runtime.model, DEPTHS)
    small = Replay(runtime.model, texts, DEPTHS, memory=need.recorded(texts) + threads * 13 * need.per_start(texts))
    assert (len(whole.chunks), len(small.chunks)) == (threads, -(-len(texts) * (NEW_TOKENS - 1) // 13))
    one, other = whole.run(ENDS_SKIPPED, lambda first: 4), small.run(ENDS_SKIPPED, lambda first: 4)
    assert (one.weight == other.weight).all()
    assert small.run(ENDS_SKIPPED, lambda first: 0).depths == 0


def test_threads_share_a_small_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfspec_search.replay.replay, "threads_for", lambda device: 16)
    runtime = llama_runtime()
    texts, need = texts_of(runtime, random_prompts(*LENGTHS)), Memory(runtime.model, DEPTHS)
    replay = Replay(runtime.model, texts, DEPTHS, memory=need.recorded(texts) + 3 * need.per_start(texts))
    assert replay._threads * max(len(chunk) for chunk in replay.chunks) <= 3


def test_a_replay_of_some_texts_has_their_table_and_shares_the_recordings() -> None:
    runtime, texts = llama_texts()
    whole = Replay(runtime.model, texts, DEPTHS)
    few = whole.only([1, 4])
    one, other = whole.run(ENDS_SKIPPED), few.run(ENDS_SKIPPED)
    assert (one.weight[[1, 4]] == other.weight).all()
    assert other.texts == 2
    assert few.recordings is whole.recordings
    assert few.first_depth(ENDS_SKIPPED).agreement == pytest.approx(one.only([1, 4]).agreement)


def test_an_error_about_too_little_memory_names_an_amount_that_suffices() -> None:
    runtime, texts = llama_texts()
    with pytest.raises(
        InputError, match=r"budget of 3 KiB is too small: the keys and values of 5 texts take .* give at least"
    ) as e:
        Replay(runtime.model, texts, DEPTHS, memory=3000)
    enough = parse_size(str(e.value).split("at least ")[1].split(",")[0].replace(" ", ""))
    assert len(Replay(runtime.model, texts, DEPTHS, memory=enough).chunks) > 1


@pytest.mark.parametrize(
    ("family", "sampling", "starts"),
    [
        ("llama", Sampling(), 17),
        pytest.param("llama", Sampling(do_sample=True, top_p=0.95), 17, marks=pytest.mark.slow),
        ("llama", Sampling(), 2000),
        pytest.param("gemma2", Sampling(), 60, marks=pytest.mark.slow),
        pytest.param("mixtral", Sampling(), 17, marks=pytest.mark.slow),
    ],
    ids=lambda x: "sampled" if isinstance(x, Sampling) and x.do_sample else "greedy" if isinstance(x, Sampling) else x,
)
def test_a_replay_stays_within_its_memory(
    monkeypatch: pytest.MonkeyPatch, family: str, sampling: Sampling, starts: int
) -> None:
    # Count the bytes of all live tensors; `TorchDispatchMode` sees one thread only.
    monkeypatch.setattr(selfspec_search.replay.replay, "threads_for", lambda device: 1)
    runtime = Runtime(damped_model(family, ENDS_SKIPPED), ENDS_SKIPPED)
    short = texts_of(runtime, random_prompts(*LENGTHS * 2), 31, sampling)
    texts = [*short[:4], *texts_of(runtime, random_prompts(7, 23), 211, sampling), *short[4:]]
    need = Memory(runtime.model, DEPTHS, sampled=sampling.do_sample)
    budget = need.recorded(texts) + starts * need.per_start(texts)
    with Allocations() as allocations:
        replay = Replay(runtime.model, texts, DEPTHS, sampling=sampling, memory=budget)
        allocations.peak = allocations.now
        for _ in range(2):
            replay.run(ENDS_SKIPPED)
        replay.only(range(len(texts))).first_depth(SkipSet())
    assert max(len(chunk) for chunk in replay.chunks) == min(starts, 10 * 30 + 2 * 210)
    assert allocations.peak < budget
    if len(replay.chunks) > 1:
        assert allocations.peak - need.recorded(texts) > starts * need.per_start(texts) / 20, (
            "the estimate is far too high"
        )


def test_the_logits_of_recorded_texts_stay_within_memory_and_do_not_depend_on_it() -> None:
    runtime = llama_runtime()
    (text,) = texts_of(runtime, random_prompts(97), 43, SAMPLING)
    view, processors = target_view(runtime.model), SAMPLING.processors(runtime.model)
    with Allocations() as at_once:
        whole = probabilities(view, text, processors, 43)
    with Allocations() as in_pieces:
        split = probabilities(view, text, processors, 5)
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-5)
    assert whole.shape == (43,)
    assert in_pieces.peak < at_once.peak


def test_padding_makes_no_batch_much_larger() -> None:
    texts = [Text(tokens=torch.zeros(length), prompt=1, allowed=length) for length in (3, 300, 5, 290, 4, 20)]
    assert batches(texts) == [[0, 4, 2], [5, 3, 1]]


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside; `peak` is the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size
