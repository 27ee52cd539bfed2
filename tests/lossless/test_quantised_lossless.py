"""Quantised drafts are lossless: greedy output is `model.generate`'s, sampled text has the model's distribution.

Statistical tests fix their seed. With a random seed each would raise a false alarm with probability 1e-6.
"""

from __future__ import annotations

from typing import Any

import laws
import pytest
import torch
from captured import (
    GREEDY,
    LOOKUP,
    NEW_TOKENS,
    WARPERS,
    assert_captured,
    assert_replays,
    assert_same_draws,
    compiled_whole,
    fixed_widths,
    graphs_of,
    kinds_of_layers,
    taped,
)
from laws import V, assert_sampled_texts_follow
from models import LAYERS, assert_exercised, damp
from near_ties import judge_every_token
from quantised_models import PROPOSED, TOKENS, damped_model, drafting, few_prompts, quantisable_model
from torch import Tensor
from transformers import PreTrainedModel

from selfspec import Format, Plan, Quantised, QuantisedSet, SelfSpeculator, SkipSet, SubVocabulary, wrap
from selfspec.models.quantised_linear import device_unsupported_reason
from selfspec.models.support import SUPPORTED_MODEL_TYPES
from selfspec.plan.draft_spec import INT4, INT8
from selfspec.plan.lookup import PromptLookup
from selfspec.plan.round_costs import RoundCosts

SAMPLING = {"do_sample": True, "max_new_tokens": NEW_TOKENS, "top_k": 0}

FEW = {"gemma3_text", "llama", "phi", "qwen3_moe"}
FAMILIES = [
    pytest.param(family, marks=[] if family in FEW else pytest.mark.slow) for family in sorted(SUPPORTED_MODEL_TYPES)
]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return damped_model("llama")


def assert_lossless(model: PreTrainedModel, plan: Plan, given: dict[str, Tensor], **options: Any) -> SelfSpeculator:
    """Greedy decoding is lossless, with accepted and with rejected drafts."""
    spec = wrap(model, plan)
    ours = spec.generate(**given, **GREEDY | options)
    assert torch.equal(ours, model.generate(**given, **GREEDY | options))
    assert 0 < spec.stats.accepted < spec.stats.drafted
    assert spec.stats.draft_bytes > 0
    return spec


# --- Greedy ---


@pytest.mark.rounding
@pytest.mark.parametrize("format", [INT4, INT8], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_of_unequal_prompts_is_model_generates(family: str, format: Format) -> None:
    model = damped_model(family)
    for lengths in ((13, 7, 10), (11,)):
        given = few_prompts(*lengths)
        spec = wrap(model, drafting(format))
        ours = spec.generate(**given, **GREEDY)
        assert torch.equal(ours, model.generate(**given, **GREEDY))
        assert_exercised(spec.stats, ours, given["input_ids"].shape[1])


@pytest.mark.rounding
@pytest.mark.parametrize("format", [INT4, INT8], ids=str)
@pytest.mark.parametrize("head", [False, True])
def test_greedy_output_with_a_trimmed_head_is_model_generates(
    head: bool, format: Format, llama: PreTrainedModel
) -> None:
    if (reason := device_unsupported_reason(format, llama.device)) is not None:
        pytest.skip(reason)
    given = few_prompts(13, 7, 10)
    spec = assert_lossless(llama, drafting(format, head=head, trimmed=True), given)
    written = spec.generate(**given, **GREEDY)[:, 13:]
    assert 0.3 < spec.stats.acceptance_rate < 0.9
    outside = set(range(TOKENS)) - set(PROPOSED.tokens)
    assert outside & set(written.flatten().tolist()), "the model must write tokens that the draft never proposes"


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.slow
def test_greedy_output_with_larger_groups_is_model_generates(size: int) -> None:
    model = damped_model("llama", hidden_size=256, head_dim=64, num_attention_heads=4, intermediate_size=256)
    assert_lossless(model, drafting(Format("int4", size)), few_prompts(11, 5))


def test_greedy_output_with_everything_quantised_and_nothing_skipped_is_model_generates() -> None:
    model = quantisable_model("llama")
    plan = Plan(skip_set=SkipSet(), quantised=Quantised.everything(INT8, LAYERS), gamma=3)
    spec = assert_lossless(model, plan, few_prompts(13, 7, 10))
    assert spec.stats.acceptance_rate > 0.5


@pytest.mark.parametrize("trimmed", [False, True])
def test_rows_end_at_their_own_stop_tokens(trimmed: bool, llama: PreTrainedModel) -> None:
    given = few_prompts(13, 7, 10)
    free = llama.generate(**given, **GREEDY)[:, 13:]
    outside = [token for token in free.flatten().tolist() if token not in PROPOSED.tokens]
    stops = [int(free[0, 4]), int(free[1, 9]), outside[-1]]
    assert_lossless(llama, drafting(trimmed=trimmed), given, eos_token_id=stops)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(PROPOSED.tokens)},
        {"bad_words_ids": [[token] for token in PROPOSED.tokens[::2]]},
        {"exponential_decay_length_penalty": (5, 1.2), "eos_token_id": 5},  # the draft cannot propose 5
        {"forced_eos_token_id": 5},
        {"remove_invalid_values": True},
        {"min_new_tokens": 9, "eos_token_id": list(PROPOSED.tokens[:40])},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_are_lossless_with_a_trimmed_head(options: dict[str, Any], llama: PreTrainedModel) -> None:
    assert 5 not in PROPOSED.tokens
    given = few_prompts(13, 7, 10)
    spec = wrap(llama, drafting(trimmed=True))
    assert torch.equal(spec.generate(**given, **GREEDY | options), llama.generate(**given, **GREEDY | options))
    assert spec.stats.drafted > 0
    assert not spec.stats.slower_paths


# --- With exit thresholds, prompt lookup and policies ---


@pytest.mark.parametrize("trimmed", [False, True])
def test_an_exit_threshold_ends_quantised_drafts_early(trimmed: bool, llama: PreTrainedModel) -> None:
    given = few_prompts(13, 7, 10)
    for threshold in (0.05, 0.07):
        spec = assert_lossless(llama, drafting(trimmed=trimmed, exit_threshold=threshold), given)
        lengths = {drafted for rounds in spec.stats.history for _, drafted, _ in rounds}
        assert len(lengths) > 2, "rows must stop at different lengths"


@pytest.mark.parametrize("trimmed", [False, True])
def test_prompt_lookup_works_with_a_quantised_draft(trimmed: bool, llama: PreTrainedModel) -> None:
    given = few_prompts(22, 5, 14)
    given["input_ids"][:, -3:] = given["input_ids"][:, :3]  # something to look up in the first row
    spec = assert_lossless(llama, drafting(trimmed=trimmed, prompt_lookup=LOOKUP), given)
    assert {drafted for rounds in spec.stats.history for _, drafted, _ in rounds} >= {3, 4}


def test_a_policy_chooses_the_length_of_a_quantised_draft(llama: PreTrainedModel) -> None:
    round_costs = RoundCosts(rows=1, draft_step=0.2, rounds=[1.0, 1.0, 1.05, 1.1, 1.15, 1.2], agreement=[0.9, 0.8])
    spec = assert_lossless(llama, drafting(round_costs=[round_costs]), few_prompts(11), max_new_tokens=60)
    assert spec.stats.policy == "adaptive"
    assert len(spec.stats.choices) > 2


# --- Sampling: the counts of all texts that a tiny model can write ---

LENGTH = 3
SOME = SubVocabulary.of([0, 1, 3], V)
WIDE = 32
HALF = SubVocabulary.of(range(0, WIDE, 2), WIDE)
HALF_QUANTISED = {
    "skip_set": SkipSet(attn={0}),
    "quantised": Quantised(format=INT4, sublayers=QuantisedSet(attn={1, 2}, mlp={0, 1, 2})),
    "gamma": 3,
}


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    return quantisable_model("llama", vocab_size=V, num_hidden_layers=3, seed=4)


@pytest.fixture(scope="module")
def wider() -> PreTrainedModel:
    """A model whose head can be quantised, even after trimming half of the vocabulary."""
    return quantisable_model("llama", vocab_size=WIDE, num_hidden_layers=3, seed=4)


def assert_texts_follow_the_model(
    model: PreTrainedModel, plan: Plan, options: dict[str, Any], accepts: set[int] | None = None
) -> None:
    torch.manual_seed(23)
    seen = {accepted for _, accepted in assert_sampled_texts_follow(wrap(model, plan), options, length=LENGTH)}
    assert seen == (set(range(LENGTH)) if accepts is None else accepts), "rows must accept different numbers of tokens"


OPTIONS = laws.OPTIONS | {
    "all together": {**laws.OPTIONS["all together"], "top_k": 4},
    "typical_p": {"typical_p": 0.8},
    "epsilon and eta": {"epsilon_cutoff": 0.02, "eta_cutoff": 0.02},
    "stop token that is not proposed": {"eos_token_id": 2},
}


@pytest.mark.parametrize(
    "trimmed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["every token", "some tokens"]
)
@pytest.mark.parametrize("setting", OPTIONS)
def test_sampled_texts_of_a_quantised_draft_follow_the_models_own_distribution(
    setting: str, trimmed: bool, small: PreTrainedModel
) -> None:
    plan = Plan(**HALF_QUANTISED, draft_vocabulary=SOME.code if trimmed else None)
    assert_texts_follow_the_model(small, plan, OPTIONS[setting])


@pytest.mark.parametrize("trimmed", [False, True], ids=["every token", "some tokens"])
@pytest.mark.parametrize("format", [INT4, INT8], ids=str)
@pytest.mark.slow
def test_sampled_texts_of_a_quantised_head_follow_the_models_own_distribution(
    format: Format, trimmed: bool, wider: PreTrainedModel
) -> None:
    quantised = Quantised(format=format, sublayers=QuantisedSet(attn={1, 2}, mlp={0, 1, 2}), head=True)
    plan = Plan(**HALF_QUANTISED | {"quantised": quantised}, draft_vocabulary=HALF.code if trimmed else None)
    assert_texts_follow_the_model(wider, plan, {"top_k": 4, "temperature": 0.7})


@pytest.mark.parametrize(
    "way",
    [{"exit_threshold": 0.5}, {"prompt_lookup": PromptLookup(gamma=3, min_ngram=1, max_ngram=2)}],
    ids=lambda way: next(iter(way)),
)
@pytest.mark.slow
def test_sampled_texts_of_ragged_quantised_drafts_follow_the_models_own_distribution(
    way: dict[str, Any], small: PreTrainedModel
) -> None:
    assert_texts_follow_the_model(small, Plan(**HALF_QUANTISED, draft_vocabulary=SOME.code, **way), {"top_k": 0})


def test_sampled_texts_follow_the_model_if_processors_suppress_every_proposed_token(small: PreTrainedModel) -> None:
    plan = Plan(**HALF_QUANTISED, draft_vocabulary=SubVocabulary.of([0, 1], V).code)
    assert_texts_follow_the_model(small, plan, {"top_k": 0, "suppress_tokens": [0, 1]}, accepts={0})


# --- Captured ---


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in ("gemma3_text", "phi", "qwen3_moe"))],
)
def test_replayed_rounds_are_lossless_and_equal_uncaptured_rounds(family: str, trimmed: bool) -> None:
    model, plan = damped_model(family), drafting(INT4 if trimmed else INT8, trimmed=trimmed)
    if family == "qwen3_moe":
        plan = drafting(plan.quantised.format, trimmed=trimmed, quantised=attention_alone(plan))  # type: ignore[union-attr]
    # `fixed_widths`: in passes of other widths sums have another order, and kernels round, so that drafts may differ.
    spec = taped(model, plan)
    assert_replays(spec, fixed_widths(model, plan), few_prompts(13, 7, 10))
    assert 0.2 < spec.stats.acceptance_rate < 0.9


def attention_alone(plan: Plan) -> Quantised:
    assert plan.quantised is not None
    sublayers = QuantisedSet(attn=plan.quantised.sublayers.attn, mlp={1})
    return Quantised(format=plan.quantised.format, sublayers=sublayers, head=True)


@pytest.mark.parametrize("lookup", [None, LOOKUP], ids=["layers", "cascade"])
@pytest.mark.slow
def test_with_the_same_seed_replayed_and_uncaptured_rounds_draw_the_same_tokens(
    lookup: PromptLookup | None, llama: PreTrainedModel
) -> None:
    plan = drafting(trimmed=True, prompt_lookup=lookup)
    spec = taped(llama, plan)
    assert_same_draws(fixed_widths(llama, plan), spec, few_prompts(11, 5, 7), **SAMPLING | WARPERS)
    assert_captured(spec)


@pytest.mark.slow
@pytest.mark.parametrize("options", [GREEDY, SAMPLING | WARPERS], ids=["greedy", "sampling"])
def test_the_host_reads_once_per_round(
    options: dict[str, Any], llama: PreTrainedModel, reads_by_round: list[list[str]]
) -> None:
    spec = taped(llama, drafting(trimmed=True))
    for _ in range(2):
        spec.generate(**few_prompts(11, 5, 7), **options)
    assert len(reads_by_round) > NEW_TOKENS // 4
    assert all(reads == ["tolist"] for reads in reads_by_round)


@pytest.mark.slow
def test_another_draft_spec_drops_the_graphs(llama: PreTrainedModel) -> None:
    spec, given, histories = taped(llama, drafting(INT4)), few_prompts(11), []
    options = GREEDY | {"max_new_tokens": 13}
    expected = llama.generate(**given, **options)
    for plan in (drafting(INT8), drafting(INT4, trimmed=True), drafting(INT8)):
        spec.runtime.draft_with(plan.draft_spec)
        assert len(graphs_of(spec)) == 0
        fresh = fixed_widths(llama, plan)
        fresh.generate(**given, **options)
        for _ in range(2):
            assert torch.equal(spec.generate(**given, **options), expected)
            assert spec.stats.history == fresh.stats.history
        histories.append(spec.stats.history)
    assert histories[0] == histories[2] != histories[1]


# --- Compiled ---


SHALLOW = {
    "skip_set": SkipSet(attn={1}),
    "quantised": Quantised(format=INT4, sublayers=QuantisedSet(attn={0}, mlp={1}), head=True),
    "draft_vocabulary": PROPOSED.code,
    "gamma": 2,
}


@pytest.fixture(scope="module")
def shallow() -> PreTrainedModel:
    """A model with few layers: compiling takes long."""
    model = quantisable_model("llama", num_hidden_layers=2)
    damp(model, SHALLOW["skip_set"], 0.1)
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's warnings
@pytest.mark.parametrize("format", [INT4, INT8], ids=str)
def test_compiled_passes_of_a_quantised_draft_give_the_tokens_of_the_model(
    format: Format, shallow: PreTrainedModel
) -> None:
    quantised = Quantised(format=format, sublayers=SHALLOW["quantised"].sublayers, head=True)
    spec, given = wrap(shallow, Plan(**SHALLOW | {"quantised": quantised}), compile=True), few_prompts(11, 5)
    assert torch.equal(spec.generate(**given, **GREEDY), shallow.generate(**given, **GREEDY))
    assert spec.stats.compiled, spec.stats.slower_paths
    assert 0.2 < spec.stats.acceptance_rate < 0.9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_compiler")
def test_captured_functions_of_a_quantised_draft_compile_as_whole_graphs(shallow: PreTrainedModel) -> None:
    spec, given = compiled_whole(shallow, Plan(**SHALLOW), "eager"), few_prompts(11, 5)
    assert torch.equal(spec.generate(**given, **GREEDY), shallow.generate(**given, **GREEDY))
    assert 0.2 < spec.stats.acceptance_rate < 0.9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_all_layers_of_a_kind_share_one_compilation_quantised_layers_too(family: str, compilations: list[int]) -> None:
    model, plan = damped_model(family), drafting(INT4, trimmed=True)
    spec = wrap(model, plan, compile=True)
    given = few_prompts(11, 5, 7)
    expected = model.generate(**given, **GREEDY)
    counts = []
    for _ in range(2):
        assert torch.equal(spec.generate(**given, **GREEDY), expected)
        assert spec.stats.compiled, spec.stats.slower_paths
        counts.append(len(compilations))
    assert counts[0] == counts[1] == kinds_of_layers(model) + kinds_of_layers(model, plan.draft_spec)
    assert not spec.stats.slower_paths
    assert 0 < spec.stats.accepted < spec.stats.drafted


# --- bfloat16 ---


@pytest.mark.rounding
@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("family", ["gemma2", "llama", "phi"])
@pytest.mark.slow
def test_in_bfloat16_output_differs_from_plain_decoding_by_near_ties_alone(family: str, trimmed: bool) -> None:
    model = damped_model(family, dtype=torch.bfloat16)
    spec, texts = wrap(model, drafting(trimmed=trimmed)), []
    for seed in range(3):
        ours = spec.generate(**few_prompts(11, seed=seed), **GREEDY)[0]
        assert 0 < spec.stats.accepted < spec.stats.drafted
        texts.append((ours[:11], ours[11:]))
    verdict = judge_every_token(spec, wrap(model, Plan.none()), texts)
    assert verdict.errors == 0, str(verdict)
    assert verdict.tokens >= 3 * NEW_TOKENS
