"""Every supported family: greedy decoding is lossless, and the draft view computes the draft of the skip set."""

from __future__ import annotations

import pytest
import torch
from models import (
    ENDS_SKIPPED,
    FIRST_DROPPED,
    LAYERS,
    WINDOW,
    assert_exercised,
    damped_model,
    prompts,
    tiny_model,
    zero_skipped_branches,
)
from transformers import PreTrainedModel

from selfspec import Plan, SkipSet, wrap
from selfspec.models.draft_view import attention_modules
from selfspec.models.support import SUPPORTED_MODEL_TYPES
from selfspec.runtime.runtime import Runtime

FAMILIES = sorted(SUPPORTED_MODEL_TYPES)
NEW_TOKENS = 24
MOSTLY_DROPPED = SkipSet(attn=range(1, LAYERS), mlp={1, 2, 3, 4, 6})
"""Keeps only parts of layers 0 and 5, so that kept layers have another index in the view than in the model."""


def test_twenty_nine_families_are_supported() -> None:
    assert len(FAMILIES) == 29


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_of_one_prompt_is_model_generates(family: str) -> None:
    assert_lossless(damped_model(family, ENDS_SKIPPED), ENDS_SKIPPED, [11])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_of_left_padded_prompts_is_model_generates(family: str) -> None:
    assert_lossless(damped_model(family, FIRST_DROPPED), FIRST_DROPPED, [13, 7, 10])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_with_the_other_skip_set_is_model_generates(family: str) -> None:
    assert_lossless(damped_model(family, FIRST_DROPPED), FIRST_DROPPED, [11])
    assert_lossless(damped_model(family, ENDS_SKIPPED), ENDS_SKIPPED, [13, 7, 10])


def assert_lossless(model: PreTrainedModel, skip_set: SkipSet, lengths: list[int]) -> None:
    tokens, mask = prompts(*lengths)
    options = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    spec = wrap(model, Plan(skip_set=skip_set, gamma=3))
    ours = spec.generate(tokens, **options)
    assert torch.equal(ours, model.generate(tokens, **options))
    assert_exercised(spec.stats, ours, tokens.shape[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_view_computes_the_model_with_its_skipped_branches_zeroed(family: str) -> None:
    # No test of the output finds a wrong draft: a wrong draft is only rejected more often.
    model = tiny_model(family, dtype=torch.float64)
    model.set_experts_implementation("eager")  # the grouped kernels have no float64
    assert_draft_is_exact(model, [ENDS_SKIPPED, MOSTLY_DROPPED])


@pytest.mark.parametrize(
    "family", ["cohere2", "exaone4", "gemma2", "gemma3_text", "ministral", "olmo3", "qwen3", "smollm3"]
)
def test_dropping_a_layer_keeps_the_attention_type_of_every_other_layer(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    assert len(set(model.config.layer_types)) == 2
    assert_draft_is_exact(model, [SkipSet(attn={i}, mlp={i}) for i in range(LAYERS)])


@torch.inference_mode()
def assert_draft_is_exact(model: PreTrainedModel, skip_sets: list[SkipSet]) -> None:
    """Compare the draft view, in two passes over several windows of tokens, with the user's model under hooks.

    The tolerance is float32's: Hugging Face computes norms, rotations and some softmaxes in float32.
    """
    tokens, _ = prompts(4 * WINDOW - 1, 4 * WINDOW - 1)
    runtime = Runtime(model)
    runtime.reserve(2, 64)
    full = model(tokens).logits
    for skip_set in skip_sets:
        runtime.draft_with(skip_set)
        assert len(attention_modules(runtime.views["draft"])) == LAYERS - len(skip_set.attn)
        hooks = zero_skipped_branches(model, skip_set)
        expected = model(tokens).logits
        for hook in hooks:
            hook.remove()
        assert (expected - full).abs().max() > 0.1 * full.abs().max(), "a skip set without effect proves nothing"
        torch.testing.assert_close(
            _in_two_passes(runtime, tokens), expected, rtol=0, atol=1e-6 * full.abs().max().item()
        )


def _in_two_passes(runtime: Runtime, tokens: torch.Tensor) -> torch.Tensor:
    runtime.cache.reset()
    first, second = tokens.split([tokens.shape[1] - WINDOW, WINDOW], dim=1)
    logits = [runtime.run("draft", first)]
    runtime.cache.lengths += first.shape[1]
    return torch.cat([*logits, runtime.run("draft", second)], dim=1)
