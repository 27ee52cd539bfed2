"""Resumed verification: the logits, the cache and the output are those of a verification that starts anew."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import LAYERS, damp, prompts, tiny_model
from quantised_models import few_prompts, quantisable_model
from torch import Tensor
from transformers import PreTrainedModel

from selfspec import Plan, Quantised, QuantisedSet, SelfSpeculator, SkipSet, Stats, SubVocabulary, wrap
from selfspec.plan import Padding, PromptLookup
from selfspec.recipe import INT4, Recipe
from selfspec.resuming import boundary_of
from selfspec.runtime import Runtime
from selfspec.sampling import Draft
from selfspec.views import SUPPORTED_MODEL_TYPES

FEW = ("gemma", "gemma3_text", "granite", "llama", "smollm3")
"""Embeddings that are scaled, layers of two kinds, branches that are scaled, and nothing of the sort."""
FAMILIES = [
    pytest.param(family, marks=() if family in FEW else pytest.mark.slow) for family in sorted(SUPPORTED_MODEL_TYPES)
]
SETS = {
    "scattered from 2": SkipSet(attn={2, 3, 6}, mlp={2, 5}),
    "scattered from 4": SkipSet(attn={5}, mlp={4, 5, 6}),
    "exit at 2": SkipSet(attn=range(2, LAYERS), mlp=range(2, LAYERS)),
    "exit at 4": SkipSet(attn=range(4, LAYERS), mlp=range(4, LAYERS)),
}
SCATTERED = SETS["scattered from 2"]
NEW = 24
TOKENS, MASK = prompts(13, 7, 10)


def damped(family: str = "llama", skip_set: SkipSet = SCATTERED, **options: Any) -> PreTrainedModel:
    model = tiny_model(family, seed=1, **options)
    damp(model, skip_set, 0.4 if family == "granite" else 0.2)  # whose branches are scaled down already
    return model


def resuming(skip_set: SkipSet = SCATTERED, **options: Any) -> Plan:
    return Plan(**{"skip_set": skip_set, "gamma": 3, "resume": True, **options})


def batch(**options: Any) -> dict[str, Any]:
    return {"input_ids": TOKENS, "attention_mask": MASK, "max_new_tokens": NEW, **options}


@contextmanager
def every_round_compared(spec: SelfSpeculator, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """After every resumed verification, start anew and compare the logits and what all layers cached; then restore
    what the resumed one cached. Yields how many columns were compared each time."""
    verify, compared = Runtime.verify, []

    def both(runtime: Runtime, tokens: Tensor, draft: Draft) -> Tensor:
        logits = verify(runtime, tokens, draft)
        if runtime.can_resume(draft):
            width = int(draft.lengths.max()) + 1  # what stands behind every row's draft is padding
            resumed = _slots(runtime)
            anew = runtime.run("target", tokens)
            _assert_close(logits[:, :width], anew[:, :width])
            for ours, theirs in zip(resumed, _slots(runtime), strict=True):
                for row, start in enumerate(runtime.cache.lengths.tolist()):
                    _assert_close(ours[row, : start + width], theirs[row, : start + width])
                theirs.copy_(ours)
            compared.append(width)
        return logits

    with monkeypatch.context() as patched:
        patched.setattr(Runtime, "verify", both)
        yield compared


def _slots(runtime: Runtime) -> list[Tensor]:
    layers = [runtime.cache.layer(layer) for layer in range(runtime.model.config.num_hidden_layers)]
    return [torch.stack([keys.flatten(2), values.flatten(2)], dim=2) for keys, values in layers]


def _assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def assert_resumed(spec: SelfSpeculator, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Stats:
    """Some rounds resume, with the same logits and cache; the output is `model.generate`'s."""
    options = options or batch()
    with every_round_compared(spec, monkeypatch) as compared:
        ours = spec.generate(**options)
    assert torch.equal(ours, spec.model.generate(**options))
    assert len(compared) == spec.stats.resumed > 0
    return spec.stats


def assert_both_ways(stats: Stats) -> None:
    """Some rounds accepted all that was drafted, others did not; and rows parted."""
    rows = [row for rows in stats.history for row in rows if row[1]]
    assert any(accepted == drafted for _, drafted, accepted in rows), "no bonus token rests on the last state"
    assert sum(accepted < drafted for _, drafted, accepted in rows) > 3
    assert any(len({accepted for _, _, accepted in rows}) > 1 for rows in stats.history)


# --- The output and all that stands behind it ---


@pytest.mark.parametrize("skip_set", SETS.values(), ids=SETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_logits_and_cache_are_those_of_a_full_verification(
    family: str, skip_set: SkipSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = wrap(damped(family, skip_set), resuming(skip_set))
    stats = assert_resumed(spec, monkeypatch)
    assert_both_ways(stats)
    assert stats.resumed >= stats.passes - 1, "only a round that drafts nothing has nothing to resume"
    assert stats.slower_paths == []


@pytest.mark.parametrize("gamma", [1, 2, 4, 5])
def test_drafts_of_every_length_resume(gamma: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = wrap(damped(), resuming(gamma=gamma))
    assert_resumed(spec, monkeypatch)
    one = {"input_ids": TOKENS[:1], "max_new_tokens": 1}
    assert torch.equal(spec.generate(**one), spec.model.generate(**one))
    assert spec.stats.resumed == 0, "one token alone is never drafted"


def test_rows_that_stop_early_do_not_disturb_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = damped()
    written = model.generate(**batch())[:, TOKENS.shape[1] :]
    stops = [int(written[0, 4]), int(written[1, 11])]
    assert_resumed(wrap(model, resuming()), monkeypatch, **batch(eos_token_id=stops))


def test_samples_are_those_of_a_full_verification_under_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = damped(), batch(do_sample=True, temperature=0.9, top_k=50)
    spec, full = wrap(model, resuming()), wrap(model, resuming(resume=False))
    with every_round_compared(spec, monkeypatch) as compared:
        torch.manual_seed(3)
        ours = spec.generate(**options)
    torch.manual_seed(3)
    assert torch.equal(ours, full.generate(**options))
    assert len(compared) == spec.stats.resumed > full.stats.resumed == 0
    assert 0.1 < spec.stats.acceptance_rate < 0.95


# --- Where the boundary is ---


def test_the_boundary_is_the_first_layer_of_which_anything_is_skipped_or_quantised() -> None:
    def quantised(skip_set: SkipSet, **sublayers: Any) -> Recipe:
        return Recipe(skip_set=skip_set, quantised=Quantised(format=INT4, sublayers=QuantisedSet(**sublayers)))

    assert boundary_of(Recipe(skip_set=SkipSet(attn={5}, mlp={3, 6})), 7) == 3
    assert boundary_of(Recipe(skip_set=SkipSet(attn={2}, mlp={3})), 7) == 2
    assert boundary_of(quantised(SkipSet(attn={5}), mlp={4}), 7) == 4
    assert boundary_of(quantised(SkipSet(attn={3}), mlp={4}), 7) == 3
    assert boundary_of(Recipe(skip_set=SkipSet(mlp={0})), 7) == 0
    assert boundary_of(Recipe(skip_set=SkipSet(mlp={6})), 7) == 6
    assert boundary_of(Recipe(), 7) == 6, "something must be left to run"
    assert boundary_of(Recipe(), 1) == 0


def test_quantised_sublayers_are_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    sublayers = QuantisedSet(attn={3, 4}, mlp={2, 6})
    model = quantisable_model("llama")
    damp(model, SkipSet(attn={5}), 0.1)
    damp(model, sublayers, 0.5)  # type: ignore[arg-type]  # any set of sub-layers
    quantised = Quantised(format=INT4, sublayers=sublayers, head=True)
    spec = wrap(model, resuming(SkipSet(attn={5}), quantised=quantised))
    options = few_prompts(13, 7, 10)
    assert_resumed(spec, monkeypatch, **options, max_new_tokens=NEW)
    assert len(spec.runtime.views["lower"].get_decoder().layers) == 2


def test_a_draft_that_differs_in_its_head_alone_leaves_one_layer_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = SubVocabulary.of(range(0, 211, 2), 211)
    spec = wrap(damped(), resuming(SkipSet(), draft_vocabulary=vocabulary.code))
    assert_resumed(spec, monkeypatch)
    assert len(spec.runtime.views["upper"].get_decoder().layers) == 1


def test_a_draft_without_exact_layers_is_verified_in_full_and_the_stats_say_why() -> None:
    skip_set = SkipSet(attn={0, 3})
    spec = wrap(damped(skip_set=skip_set), resuming(skip_set))
    assert torch.equal(spec.generate(**batch()), spec.model.generate(**batch()))
    assert (spec.stats.resumed, spec.runtime.resuming) == (0, None)
    assert spec.stats.slower_paths == [
        "verification starts anew: the draft skips or quantises something in the first layer"
    ]


def test_static_passes_are_verified_in_full_and_the_stats_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "static", True)
    spec = wrap(damped(), resuming())
    assert torch.equal(spec.generate(**batch()), spec.model.generate(**batch()))
    assert spec.stats.resumed == 0
    assert spec.stats.slower_paths == ["verification starts anew: passes are compiled or captured"]


# --- Drafts of other kinds ---


def test_a_look_at_the_drafts_confidence_spares_the_last_token_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = wrap(damped(), resuming(gamma=4, exit_threshold=0.05))
    run, lower = Runtime.run, []

    def counted(runtime: Runtime, view: Any, tokens: Tensor) -> Tensor:
        lower.extend([view] * (view == "lower"))
        return run(runtime, view, tokens)

    monkeypatch.setattr(Runtime, "run", counted)
    stats = assert_resumed(spec, monkeypatch)
    longest = [max(drafted for _, drafted, _ in rows) for rows in stats.history]
    assert 4 in longest
    assert min(longest) < 4
    assert 0 < len(lower) < stats.resumed


def test_only_rounds_in_which_layers_drafted_for_every_row_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = PromptLookup(gamma=4, min_ngram=1, max_ngram=3)
    stats = assert_resumed(wrap(damped(), resuming(prompt_lookup=lookup)), monkeypatch)
    assert set(stats.by_origin) == {"lookup", "layers"}
    assert stats.resumed < stats.passes
    alone = {"input_ids": TOKENS[:1], "max_new_tokens": NEW}
    stats = assert_resumed(wrap(damped(), resuming(prompt_lookup=lookup)), monkeypatch, **alone)
    assert set(stats.by_origin) == {"lookup", "layers"}
    without = sum(1 for rounds in stats.history for row in rounds if not row[1])
    assert 0 < stats.resumed < stats.passes - without


def test_padded_passes_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    padding = Padding(rows=3, target=[1, 2, 5, 7], draft=4)
    assert_resumed(wrap(damped(), resuming(padding=padding)), monkeypatch)


# --- What changes in between ---


def test_a_model_that_is_cast_or_changed_in_between_resumes_with_what_it_is_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = copy.deepcopy(damped())
    spec = wrap(model, resuming())
    assert_resumed(spec, monkeypatch)
    model.to(torch.float64)
    assert_resumed(spec, monkeypatch)
    model.to(torch.float32)
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.down_proj.weight.mul_(-1)
    assert_resumed(spec, monkeypatch)


def test_another_recipe_moves_the_boundary_and_leaves_no_hooks_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = wrap(damped(), resuming())
    for skip_set, boundary in ((SETS["exit at 4"], 4), (SkipSet(mlp={0}), None), (SCATTERED, 2)):
        spec.runtime.draft_with(skip_set)
        layers = spec.runtime.views["draft"].get_decoder().layers
        hooked = [layer.self_attn.layer_idx for layer in layers if layer._forward_hooks]
        assert hooked == ([] if boundary is None else [boundary - 1])
        if boundary:
            assert_resumed(spec, monkeypatch)
        else:
            assert set(spec.runtime.views) == {"target", "draft"}
            assert torch.equal(spec.generate(**batch()), spec.model.generate(**batch()))


def test_both_sides_of_the_longrope_switch_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = {"short_factor": [1.0 + i / 3 for i in range(6)], "long_factor": [3.0 + i for i in range(6)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, **factors}
    model = damped("phi3", original_max_position_embeddings=16, rope_parameters=rope)
    spec = wrap(model, resuming())
    for length in (5, 17, 6):
        tokens, mask = prompts(length)
        assert_resumed(spec, monkeypatch, input_ids=tokens, attention_mask=mask, max_new_tokens=9)
        spec.runtime.draft_with(SCATTERED)  # new views, on no side yet


def test_the_users_model_gets_no_hooks() -> None:
    model = damped()
    wrap(model, resuming()).generate(**batch())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_plan_keeps_whether_it_resumes() -> None:
    assert Plan.from_json(resuming().to_json()).resume
    assert str(resuming()).endswith("gamma 3, resumed")
    other = Plan(skip_set=SCATTERED, gamma=3)
    assert not other.resume
    assert "resume" not in other.to_json(), "plans that do not use it look as they always did"
