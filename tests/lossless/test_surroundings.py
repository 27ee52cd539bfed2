"""What surrounds a call and is no option of the call: `torch.autocast`, and torch's default device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from captured import CASCADE, GREEDY, PLAN, SAMPLING, batch, taped
from models import FIRST_DROPPED, damped_model
from pairs import tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, TextStreamer

from selfspec import Plan, SkipSet, UnsupportedModelError, UnsupportedOptionError, wrap


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return damped_model("llama", FIRST_DROPPED)


# --- torch.autocast ---


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_under_autocast_model_generate_decodes_and_stats_say_so(model: PreTrainedModel) -> None:
    given, full = batch(11, 5), model.generate(**batch(11, 5), **GREEDY)
    spec = wrap(model, PLAN)
    with autocast():
        mixed = model.generate(**given, **GREEDY)
        assert torch.equal(spec.generate(**given, **GREEDY), mixed)
        assert "torch.autocast is on" in spec.stats.slower_paths[0]
        assert torch.equal(wrap(model, PLAN).generate(**given, **GREEDY), mixed)
        with pytest.raises(UnsupportedOptionError, match=r"torch.autocast is on.*cannot be streamed"):
            next(spec.stream(given["input_ids"][:1], **GREEDY))
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(spec.generate(**given, **GREEDY), full)
    assert not torch.equal(mixed, full), "mixed precision writes the same text: choose another prompt"
    assert torch.equal(spec.generate(**given, **GREEDY), full)
    assert spec.stats.drafted


def test_a_model_wrapped_under_autocast_decodes_as_any_other(model: PreTrainedModel) -> None:
    with autocast():
        spec = wrap(model, PLAN)
    assert torch.equal(spec.generate(**batch(11), **GREEDY), model.generate(**batch(11), **GREEDY))
    assert spec.stats.drafted


def test_autocast_of_another_device_changes_nothing(model: PreTrainedModel) -> None:
    spec = wrap(model, PLAN)
    with torch.autocast("mtia", dtype=torch.bfloat16):
        assert torch.equal(spec.generate(**batch(11), **GREEDY), model.generate(**batch(11), **GREEDY))
    assert spec.stats.drafted


def test_the_consumer_of_a_stream_may_compute_in_mixed_precision(model: PreTrainedModel) -> None:
    expected = model.generate(**batch(11), **GREEDY)[0, 11:].tolist()
    stream = wrap(model, PLAN).stream(**batch(11), **GREEDY)
    written = [next(stream)]
    with autocast():
        written += stream
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16, "the consumer's own context is kept"
    assert written == expected


@pytest.fixture
def prepare() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Prepares a model for mixed precision in bfloat16."""
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare  # type: ignore[no-any-return]


def test_a_model_that_accelerate_prepares_after_wrap_is_decoded_by_model_generate(
    model: PreTrainedModel, prepare: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    own = copy.deepcopy(model)
    spec = wrap(own, PLAN)
    full = spec.generate(**batch(11, 5), **GREEDY)
    prepared = prepare(own)
    mixed = prepared.generate(**batch(11, 5), **GREEDY)
    assert not torch.equal(mixed, full), "mixed precision writes the same text: choose another prompt"
    assert torch.equal(spec.generate(**batch(11, 5), **GREEDY), mixed)
    assert "model.forward was replaced" in spec.stats.slower_paths[0]


def test_a_model_that_accelerate_prepared_before_wrap_is_refused_until_it_is_unwrapped(
    model: PreTrainedModel, prepare: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    prepared = prepare(copy.deepcopy(model))
    with pytest.raises(UnsupportedModelError, match=r"model.forward was replaced"):
        wrap(prepared, PLAN)
    unwrapped = pytest.importorskip("accelerate").utils.extract_model_from_parallel(prepared, keep_fp32_wrapper=False)
    spec = wrap(unwrapped, PLAN)
    assert torch.equal(spec.generate(**batch(11), **GREEDY), model.generate(**batch(11), **GREEDY))
    assert spec.stats.drafted


def test_a_forward_that_turns_autocast_on_is_refused(model: PreTrainedModel) -> None:
    class Mixed(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with autocast():
                return super().forward(*args, **kwargs)

    with pytest.raises(UnsupportedModelError, match=r"attention of layer 0 runs under torch.autocast") as error:
        wrap(Mixed(model.config).eval(), PLAN)
    assert "\n" not in str(error.value)


# --- The default device ---


@pytest.fixture
def default_device() -> Iterator[None]:
    """Tensors that are made without a device lie on `meta`, where they have no values."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("plan", [PLAN, CASCADE, "draft model"], ids=["layers", "cascade", "draft model"])
@pytest.mark.parametrize("options", [GREEDY, SAMPLING | {"top_k": 1}], ids=["greedy", "sampling"])
def test_no_tensor_is_made_on_the_default_device(
    plan: Any, options: dict[str, Any], model: PreTrainedModel, default_device: None
) -> None:
    own = {"draft_model": copy.deepcopy(model)} if plan == "draft model" else {}
    with torch.device("cpu"):
        given = batch(11, 5)
        expected = model.generate(**given, **options)
    spec = wrap(model, Plan(skip_set=SkipSet(), gamma=3) if own else plan, **own)
    written = spec.generate(**given, **options, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(written.sequences, expected)
    assert list(spec.stream(given["input_ids"][:1], **options, max_time=1e6)) == expected[0, 11:].tolist()
    spec.generate(given["input_ids"][:1], **options, streamer=TextStreamer(tokenizer()))


def test_captured_rounds_make_no_tensor_on_the_default_device(model: PreTrainedModel, default_device: None) -> None:
    with torch.device("cpu"):
        given: dict[str, Tensor] = batch(11, 5)
    spec = taped(model, CASCADE)
    for _ in range(2):
        assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    assert spec.stats.captured
