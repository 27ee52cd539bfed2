"""Compiled passes write the model's own tokens. Passes that cannot be compiled run eagerly, and stats say why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured import kinds_of_layers
from models import FIRST_DROPPED, damped_model, prompts
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import selfspec
import selfspec.runtime.prefill
from selfspec import Plan, SkipSet
from selfspec.models.views import decoder_layers
from selfspec.runtime import compiling

PROMPT = torch.tensor([[3, 5, 7, 11, 13, 17, 19]])


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=53,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


PLAN = Plan(skip_set=SkipSet(mlp={1}), gamma=2)
OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's warnings
def test_compiled_passes_are_lossless_before_and_after_the_cache_grows(model: PreTrainedModel) -> None:
    spec = selfspec.wrap(model, PLAN, compile=True)
    for new_tokens in (19, 211, 23):
        expected = model.generate(PROMPT, max_new_tokens=new_tokens, **OPTIONS)
        assert torch.equal(spec.generate(PROMPT, max_new_tokens=new_tokens, **OPTIONS), expected)
    assert spec.stats.compiled
    assert 0 < spec.stats.accepted < spec.stats.drafted


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)


def graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> torch.Tensor:
        raise compiling.COMPILE_ERRORS[0]("graph break in the middle\nand pages of advice")

    monkeypatch.setattr("selfspec.runtime.passes.compile_pass", lambda forward: refuses)


@pytest.mark.parametrize(
    ("prevent", "reason"),
    [
        (no_compiler, "passes run eagerly: no C++ compiler was found (install g++ or clang, or set CXX)"),
        (graph_breaks, "passes run eagerly: graph break in the middle"),
    ],
)
def test_passes_that_cannot_be_compiled_run_eagerly_and_stats_say_why(
    prevent: Callable[[pytest.MonkeyPatch], None], reason: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prevent(monkeypatch)
    spec, options = selfspec.wrap(model, PLAN, compile=True), {"max_new_tokens": 11, **OPTIONS}
    assert torch.equal(spec.generate(PROMPT, **options), model.generate(PROMPT, **options))
    assert not spec.stats.compiled
    assert reason in spec.stats.slower_paths


def test_a_compiled_pass_gets_tokens_in_one_memory_layout(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_its_first_call(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        layouts = set()

        def run(tokens: Tensor) -> Tensor:
            layouts.add((tokens.shape, tokens.stride()))
            assert len(layouts) == 1, "compiled code accepts one layout"
            return forward(tokens)

        return run

    monkeypatch.setattr("selfspec.runtime.passes.compile_pass", of_its_first_call)
    monkeypatch.setattr("selfspec.runtime.passes.uncompiled_reason", lambda device: None)
    spec = selfspec.wrap(model, PLAN, compile=True)
    given, mask = prompts(7, 5)
    options = {"attention_mask": mask, "max_new_tokens": 19, **OPTIONS}
    assert torch.equal(spec.generate(given % 53, **options), model.generate(given % 53, **options))
    assert spec.stats.compiled


def test_two_passes_never_share_compiled_code() -> None:
    def forward(tokens: torch.Tensor) -> torch.Tensor:
        return tokens

    seen = []
    original = torch.compile
    try:
        torch.compile = lambda function, **_: seen.append(function) or function
        compiling.compile_pass(forward)
        compiling.compile_pass(forward)
    finally:
        torch.compile = original
    assert seen[0].__code__ is not seen[1].__code__


# --- Layers compiled one by one, as on CUDA ---


FUSED = Plan(skip_set=FIRST_DROPPED, gamma=3)


@pytest.mark.filterwarnings("ignore")  # the compiler's warnings
@pytest.mark.parametrize(("family", "kinds"), [("llama", 1 + 3), ("gemma3_text", 2 + 3)])
def test_all_layers_of_a_kind_share_one_compilation_per_pass_length(
    family: str, kinds: int, compilations: list[int]
) -> None:
    model = damped_model(family, FIRST_DROPPED)
    assert kinds_of_layers(model) + kinds_of_layers(model, FIRST_DROPPED) == kinds
    spec = selfspec.wrap(model, FUSED, compile=True)
    tokens, mask = prompts(11, 5, 7)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 21}
    expected = model.generate(tokens, **options)
    for _ in range(2):
        assert torch.equal(spec.generate(tokens, **options), expected)
        assert len(compilations) == kinds, "verify passes of 4 tokens, and draft passes of 1 token"
    assert spec.stats.compiled
    assert not spec.stats.slower_paths
    assert 0 < spec.stats.accepted < spec.stats.drafted


@pytest.mark.filterwarnings("ignore")
def test_layers_are_compiled_in_rounds_only(compilations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = selfspec.wrap(damped_model("llama", FIRST_DROPPED), FUSED, compile=True)
    layers = [layer for view in spec.runtime.views for layer in decoder_layers(view)]
    prefill, seen = selfspec.runtime.prefill.prefill, []

    def watched(*args: Any) -> None:
        seen.append(len(compilations))
        prefill(*args)
        assert len(compilations) == seen[-1]
        assert not any("forward" in vars(layer) for layer in layers)

    monkeypatch.setattr(selfspec.runtime.prefill, "prefill", watched)
    for length in (11, 17):
        spec.generate(prompts(length)[0], do_sample=False, max_new_tokens=7)
    assert seen == [0, 4]
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("skip_set", [SkipSet(mlp={1}), SkipSet(attn={1})], ids=["MLP", "attention"])
def test_new_cache_sizes_never_reach_the_recompile_limit(
    model: PreTrainedModel, compilations: list[int], skip_set: SkipSet
) -> None:
    spec, limit = selfspec.wrap(model, PLAN.model_copy(update={"skip_set": skip_set}), compile=True), 3
    with torch._dynamo.config.patch(recompile_limit=limit):
        for rows in (*range(1, limit + 3), 1):
            spec.generate(PROMPT.expand(rows, -1), max_new_tokens=5, **OPTIONS)
            assert spec.stats.compiled, spec.stats.slower_paths
    assert len(compilations) == (limit + 2) * 3, "an earlier size reuses its compiled code"


@pytest.mark.filterwarnings("ignore")
def test_beyond_the_recompile_limit_layers_run_eagerly_and_stats_say_why(compilations: list[int]) -> None:
    model = damped_model("gemma3_text", FIRST_DROPPED)  # layers with a window and without
    spec = selfspec.wrap(model, FUSED, compile=True)
    tokens = prompts(11)[0]
    with torch._dynamo.config.patch(recompile_limit=1):
        output = spec.generate(tokens, do_sample=False, max_new_tokens=11)
    assert torch.equal(output, model.generate(tokens, do_sample=False, max_new_tokens=11))
    assert not spec.stats.compiled
    assert any("limit" in reason for reason in spec.stats.slower_paths), spec.stats.slower_paths


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("flash_attn_installed")
def test_layers_with_the_flash_attn_package_are_compiled(
    compilations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "selfspec.runtime.attention.flash._flash_unsupported_reason", lambda needs: None
    )  # serve this CPU
    model = damped_model("gemma3_text", FIRST_DROPPED)
    spec = selfspec.wrap(model, FUSED, compile=True, backend="flash-attn")
    tokens, mask = prompts(11, 5)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 11}
    assert torch.equal(spec.generate(tokens, **options), model.generate(tokens, **options))
    assert spec.stats.compiled, spec.stats.slower_paths
    assert spec.stats.backend == "flash-attn"
    assert len(compilations) == 5
