"""The static cache: the content between rounds, the capacity, and that only one cache exists."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from models import CACHE, FIRST_DROPPED, LAYERS, damped_model, prompts, tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import selfspec.decoding.round
import selfspec.runtime.kv_cache
import selfspec.runtime.model_views
import selfspec.runtime.prefill
from selfspec import Plan, SkipSet, wrap
from selfspec.decoding.request import Request
from selfspec.models.attention_hook import LayerShape
from selfspec.models.draft_view import attention_modules
from selfspec.models.views import reachable_tensors
from selfspec.runtime.attention.sdpa import Sdpa
from selfspec.runtime.kv_cache import KVCache
from selfspec.runtime.prefill import prefill
from selfspec.runtime.runtime import Runtime

GAMMA = 3
PLAN = Plan(skip_set=FIRST_DROPPED, gamma=GAMMA)
GREEDY = {"do_sample": False, "max_new_tokens": 19}


@pytest.fixture
def model() -> PreTrainedModel:
    return damped_model("llama", FIRST_DROPPED)


def small_cache(**changes: Any) -> KVCache:
    layers = {2: LayerShape(heads=3, key_dim=5, value_dim=7), 4: LayerShape(heads=1, key_dim=11, value_dim=13)}
    settings = {"rows": 2, "slots": 17, "device": torch.device("cpu"), "dtype": torch.float32, "backend": Sdpa()}
    return KVCache(layers, **settings | changes)


def cache_tensors(cache: KVCache) -> list[Tensor]:
    return [tensor for index in cache._tensors for tensor in cache.layer(index)]


# --- Between rounds ---


@pytest.fixture
def after_each_round(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Functions that are called with the runtime and the request after every round."""
    checks: list[Any] = []
    step = selfspec.decoding.round.step

    def checked(runtime: Runtime, drafter: Any, request: Request, stats: Any) -> Any:
        committed = step(runtime, drafter, request, stats)
        for check in checks:
            check(runtime, request)
        return committed

    monkeypatch.setattr(selfspec.decoding.round, "step", checked)
    return checks


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_between_rounds_every_layer_holds_the_committed_tokens_except_the_last(
    family: str, after_each_round: list[Any]
) -> None:
    model = damped_model(family, FIRST_DROPPED).to(torch.float64)

    def check(runtime: Runtime, request: Request) -> None:
        assert runtime.cache.lengths.tolist() == (request.ends - request.pads - 1).tolist()
        assert all(tensor.isfinite().all() for tensor in cache_tensors(runtime.cache)), "unused slots included"
        for row, (pad, end) in enumerate(zip(request.pads.tolist(), request.ends.tolist(), strict=True)):
            fresh = DynamicCache()
            model(request.sequences[row : row + 1, pad : end - 1], **{CACHE: fresh})
            for index in range(LAYERS):
                keys, values = runtime.cache.layer(index)
                for ours, theirs in ((keys, fresh.layers[index].keys), (values, fresh.layers[index].values)):
                    held = ours[row, : end - 1 - pad].transpose(0, 1)
                    torch.testing.assert_close(held, theirs[0], rtol=0, atol=1e-9)

    after_each_round.append(check)
    spec = wrap(model, PLAN)
    tokens, mask = prompts(13, 7, 10)
    stop = early_stop(model, tokens, mask)
    spec.generate(tokens, attention_mask=mask, eos_token_id=stop, **GREEDY)
    assert {accepted for rounds in spec.stats.history for _, _, accepted in rounds} == set(range(GAMMA + 1))
    assert spec.stats.passes > 5


def early_stop(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> int:
    """A stop token that ends one row long before the others: finished rows must keep the invariant, too."""
    rows = model.generate(tokens, attention_mask=mask, **GREEDY)[:, tokens.shape[1] :].tolist()
    return next(t for t in rows[1][3:8] if t not in rows[0] + rows[2] and rows[1].index(t) < 8)


def test_prefill_caches_each_prompt_except_the_last_token(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = wrap(model, PLAN)
    tokens, mask = prompts(13, 1, 10)
    lengths: list[list[int]] = []

    def look(runtime: Runtime, *_: Any) -> None:
        lengths.append(runtime.cache.lengths.tolist())
        raise InterruptedError

    monkeypatch.setattr(selfspec.decoding.round, "step", look)
    with pytest.raises(InterruptedError):
        spec.generate(tokens, attention_mask=mask, **GREEDY)
    assert lengths == [[12, 0, 9]]


def test_every_row_always_has_room_for_a_whole_round(
    model: PreTrainedModel, after_each_round: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfspec.runtime.kv_cache, "SLOT_BUCKET", 1)  # no slack
    rooms: list[int] = []

    def check(runtime: Runtime, request: Request) -> None:
        rooms.append(runtime.cache.slots - int(runtime.cache.lengths.max()))

    after_each_round.append(check)
    spec = wrap(model, PLAN)
    tokens, mask = prompts(13, 7, 13)
    options = GREEDY | {"attention_mask": mask}
    # The length limit ends two rows in different rounds. A stop token ends the third row early.
    options["eos_token_id"] = early_stop(model, tokens, mask)
    assert torch.equal(spec.generate(tokens, **options), model.generate(tokens, **options))
    assert min(rooms) >= GAMMA + 1
    assert spec.runtime.cache.slots == 13 + 19 + GAMMA + 1


# --- Rewinding and passes ---


@torch.inference_mode()
def test_rewinding_is_an_assignment(model: PreTrainedModel) -> None:
    runtime = Runtime(model, FIRST_DROPPED)
    runtime.reserve(2, 32)
    tokens, _ = prompts(7, 7)
    prefill(runtime, tokens, torch.tensor([7, 4]))
    following, wrong = prompts(3, 3, seed=1)[0], prompts(5, 5, seed=2)[0]
    expected = runtime.run("target", following)
    for name in ("draft", "target"):
        runtime.cache.lengths += 2
        runtime.run(name, wrong)  # type: ignore[arg-type]
        runtime.cache.lengths -= 2
    torch.testing.assert_close(runtime.run("target", following), expected, rtol=0, atol=0)


@torch.inference_mode()
def test_rows_do_not_see_each_other(model: PreTrainedModel) -> None:
    runtime = Runtime(model)
    tokens, _ = prompts(11, 11, 11)
    lengths = torch.tensor([2, 11, 5])
    runtime.reserve(3, 32)
    prefill(runtime, tokens, lengths)
    following = prompts(2, 2, 2, seed=1)[0]
    together = runtime.run("target", following)
    for row, length in enumerate(lengths.tolist()):
        alone = model(torch.cat([tokens[row, :length], following[row]])[None]).logits[0, -2:]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)


def test_a_pass_starts_after_the_cached_tokens_of_each_row() -> None:
    cache = small_cache()
    cache.lengths = torch.tensor([3, 11], dtype=torch.int32)
    step = cache.begin(4)
    assert step.positions.tolist() == [[3, 4, 5, 6], [11, 12, 13, 14]]
    assert step.starts(5).tolist() == [0, 5, 10]
    assert step.starts(5).dtype == torch.int32


def test_a_mask_is_causal_and_limited_to_the_window() -> None:
    cache = small_cache(slots=7)
    cache.lengths = torch.tensor([3, 0], dtype=torch.int32)
    mask = cache.begin(2, static=True).mask(window=3, groups=2, dtype=torch.float32)
    assert mask is not None
    seen = ["".join("#" if value == 0 else "." for value in line) for line in mask[:, 0].flatten(0, 1).tolist()]
    after_three, after_none = [".###...", "..###.."], ["#......", "##....."]
    assert mask.shape == (2, 1, 4, 7)
    assert seen == [*after_three, *after_three, *after_none, *after_none]  # once per head of a group


def test_a_dynamic_pass_looks_at_the_longest_row_only() -> None:
    cache = small_cache(slots=7)
    cache.lengths = torch.tensor([3, 0], dtype=torch.int32)
    near, far = (cache.begin(2, static=static).mask(None, 1, torch.float32) for static in (False, True))
    assert near is not None
    assert far is not None
    assert near.shape[-1] == 5
    assert torch.equal(near, far[..., :5])
    assert bool(far[..., 5:].isinf().all())


@pytest.mark.parametrize(("t", "window", "needed"), [(1, None, False), (1, 4, False), (1, 3, True), (2, None, True)])
def test_a_pass_of_one_token_and_one_row_needs_a_mask_beyond_the_window_only(
    t: int, window: int | None, needed: bool
) -> None:
    cache = small_cache(rows=1, slots=7)
    cache.lengths = torch.tensor([3], dtype=torch.int32)
    assert (cache.begin(t).mask(window, 1, torch.float32) is not None) == needed


# --- Prefill ---


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.inference_mode()
def test_prefill_in_chunks_equals_prefill_in_one_pass(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(tiny_model(family, dtype=torch.float64))
    tokens, lengths = prompts(19, 19, 19)[0], torch.tensor([19, 4, 12])
    held = []
    for chunk in (512, 19, 7, 1):
        monkeypatch.setattr(selfspec.runtime.prefill, "CPU_CHUNK", chunk)
        runtime.reserve(3, 32)
        prefill(runtime, tokens, lengths)
        assert runtime.cache.lengths.tolist() == lengths.tolist()
        held.append([tensor[:, :19].clone() for tensor in cache_tensors(runtime.cache)])
    for other in held[1:]:
        for ours, whole in zip(other, held[0], strict=True):
            for row, length in enumerate(lengths.tolist()):
                torch.testing.assert_close(ours[row, :length], whole[row, :length], rtol=0, atol=1e-10)


# --- Errors ---


def test_zeroing_works_outside_inference_mode() -> None:
    with torch.inference_mode():
        cache = small_cache()
        cache.lengths += 3
        for tensor in cache_tensors(cache):
            tensor.fill_(torch.nan)
    cache.zero()
    assert cache.lengths.tolist() == [0, 0]
    assert all((tensor == 0).all() for tensor in cache_tensors(cache))


def test_after_an_error_in_a_request_the_cache_is_finite_and_the_error_is_raised(model: PreTrainedModel) -> None:
    spec = wrap(model, PLAN)
    tokens, _ = prompts(11)
    expected = spec.generate(tokens, **GREEDY)

    class Poison:
        calls = 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            Poison.calls += 1
            if Poison.calls == 3:
                with torch.inference_mode():
                    for tensor in cache_tensors(spec.runtime.cache):
                        tensor[:, -9:] = torch.nan
                raise ZeroDivisionError("the user's own")
            return scores

    with pytest.raises(ZeroDivisionError, match="the user's own"):
        spec.generate(tokens, logits_processor=[Poison()], **GREEDY)
    assert all(tensor.isfinite().all() for tensor in cache_tensors(spec.runtime.cache))
    assert torch.equal(spec.generate(tokens, **GREEDY), expected)


def test_closing_a_stream_zeroes_the_cache(model: PreTrainedModel) -> None:
    spec = wrap(model, PLAN)
    tokens, _ = prompts(11)
    expected = spec.generate(tokens, **GREEDY)
    stream = spec.stream(tokens, **GREEDY)
    next(stream)
    stream.close()
    assert all((tensor == 0).all() for tensor in cache_tensors(spec.runtime.cache))
    assert torch.equal(spec.generate(tokens, **GREEDY), expected)


# --- One cache for all requests ---


@pytest.mark.parametrize(("requested", "capacity"), [(1, 128), (128, 128), (129, 256), (1000, 1024)])
def test_capacities_are_multiples_of_the_bucket(requested: int, capacity: int) -> None:
    assert KVCache.bucketed(requested) == capacity


def test_a_cache_reports_its_size() -> None:
    assert small_cache().nbytes == 2 * 17 * (3 * (5 + 7) + 1 * (11 + 13)) * 4
    assert [tuple(tensor.shape) for tensor in small_cache().layer(4)] == [(2, 17, 1, 11), (2, 17, 1, 13)]


def test_repeated_requests_keep_the_cache_in_place(model: PreTrainedModel) -> None:
    spec = wrap(model, PLAN)
    places = set()
    for length, new in ((11, 19), (5, 3), (29, 31), (11, 19)):
        tokens, mask = prompts(length, 3)
        spec.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=new)
        places.add(tuple(tensor.data_ptr() for tensor in cache_tensors(spec.runtime.cache)))
    assert len(places) == 1
    assert spec.runtime.cache.slots == 128


def test_the_old_cache_is_freed_before_a_larger_cache_is_allocated(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(model, FIRST_DROPPED)
    runtime.reserve(1, 13)
    old = [weakref.ref(tensor) for tensor in cache_tensors(runtime.cache)]
    alive: list[int] = []

    class Watched(KVCache):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            alive.append(sum(reference() is not None for reference in old))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(selfspec.runtime.model_views, "KVCache", Watched)
    runtime.reserve(1, 1300)
    assert alive == [0]


def test_an_outgrown_cache_is_freed_and_nothing_else_is_allocated(model: PreTrainedModel) -> None:
    spec = wrap(model, PLAN)
    for skip_set in (SkipSet(), FIRST_DROPPED):  # skipped attention modules must not hold the cache
        spec.runtime.draft_with(skip_set)
        spec.generate(prompts(11)[0], **GREEDY)
    outgrown = [weakref.ref(tensor) for tensor in cache_tensors(spec.runtime.cache)]
    spec.generate(prompts(11)[0], do_sample=False, max_new_tokens=150)
    gc.collect()
    assert spec.runtime.cache.slots == 256
    assert [ref() for ref in outgrown] == [None] * len(outgrown)
    in_views = storages(tensor for view in spec.runtime.views for tensor in reachable_tensors(view))
    assert in_views == storages(reachable_tensors(model)) | storages(cache_tensors(spec.runtime.cache))


def test_target_and_draft_write_to_the_same_slots(model: PreTrainedModel) -> None:
    runtime = Runtime(model, FIRST_DROPPED)
    runtime.reserve(1, 8)
    for view in runtime.views:
        for module in attention_modules(view):
            keys, values = runtime.cache.layer(module.layer_idx)  # type: ignore[arg-type]
            assert module.selfspec_keys is keys
            assert module.selfspec_values is values
    assert not any("selfspec" in name for name in runtime.views["target"].state_dict())


def storages(tensors: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
