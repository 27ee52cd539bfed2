"""Compiled passes: the same tokens, or eager with the reason."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import selfspec
from selfspec import Plan, SkipSet, compiling

PROMPT = torch.tensor([[3, 5, 7, 11, 13, 17, 19]])


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=53,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


PLAN = Plan(skip_set=SkipSet(attn={1}, mlp={1, 2}), gamma=2)
OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_passes_give_the_tokens_of_the_model_also_after_the_cache_grew(model: PreTrainedModel) -> None:
    spec = selfspec.wrap(model, PLAN, compile=True)
    for new_tokens in (19, 211, 23):
        expected = model.generate(PROMPT, max_new_tokens=new_tokens, **OPTIONS)
        assert torch.equal(spec.generate(PROMPT, max_new_tokens=new_tokens, **OPTIONS), expected)
    assert spec.stats.compiled
    assert 0 < spec.stats.accepted < spec.stats.drafted


def test_without_a_compiler_passes_run_eagerly_and_stats_say_why(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    spec = selfspec.wrap(model, PLAN, compile=True)
    assert torch.equal(
        spec.generate(PROMPT, max_new_tokens=11, **OPTIONS), model.generate(PROMPT, max_new_tokens=11, **OPTIONS)
    )
    assert not spec.stats.compiled
    assert any("no C++ compiler" in reason for reason in spec.stats.slower_paths)


def test_a_model_that_cannot_be_compiled_runs_eagerly_and_stats_say_why(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> torch.Tensor:
        raise compiling.COMPILE_ERRORS[0]("graph break in the middle\nand pages of advice")

    monkeypatch.setattr("selfspec.runtime.compile_pass", lambda forward: refuses)
    spec = selfspec.wrap(model, PLAN, compile=True)
    assert torch.equal(
        spec.generate(PROMPT, max_new_tokens=11, **OPTIONS), model.generate(PROMPT, max_new_tokens=11, **OPTIONS)
    )
    assert not spec.stats.compiled
    assert "passes run eagerly: graph break in the middle" in spec.stats.slower_paths


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
