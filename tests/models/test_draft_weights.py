"""DraftWeights: the draft computes the draft spec, the user's model does not change, and memory is as predicted."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import LAYERS, zero_skipped_branches
from quantised_models import PROPOSED, SKIPPED, TOKENS, damped_model, drafting, few_prompts, quantisable_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import selfspec.models.draft_weights
from selfspec import (
    DraftSpec,
    Format,
    InputError,
    Plan,
    PlanError,
    Quantised,
    QuantisedSet,
    SelfSpeculator,
    SkipSet,
    SubVocabulary,
    draft_bytes,
    wrap,
)
from selfspec.errors import UnsupportedModelError
from selfspec.models.draft_view import draft_view
from selfspec.models.draft_weights import (
    DraftWeights,
    TrimmedHead,
    check_memory,
    check_vocabulary,
    draft_weight_bytes,
    quantisable,
    unsupported_reasons,
)
from selfspec.models.quantised_linear import QuantisedLinear, QuantisedWeight, device_unsupported_reason
from selfspec.models.support import SUPPORTED_MODEL_TYPES
from selfspec.models.views import decoder_layers, reachable_tensors
from selfspec.plan.draft_spec import INT4, INT8
from selfspec.runtime.runtime import Runtime

GREEDY = {"do_sample": False, "max_new_tokens": 19}
FORMATS = [INT4, INT8]
EVERYTHING = DraftSpec(quantised=Quantised.everything(INT4, LAYERS))
DRAFT_SPECS = {
    "sub-layers": drafting(head=False).draft_spec,
    "sub-layers and head": drafting(INT8).draft_spec,
    "sub-layers and trimmed head": drafting(trimmed=True).draft_spec,
    "sub-layers, and a head that is only trimmed": drafting(INT8, head=False, trimmed=True).draft_spec,
    "head": DraftSpec(quantised=Quantised(format=INT4, head=True)),
    "trimmed head": DraftSpec(vocabulary=PROPOSED),
    "a trimmed head of an unsupported size": DraftSpec(
        quantised=Quantised(format=INT8, head=True), vocabulary=SubVocabulary.of(range(0, TOKENS, 7), TOKENS)
    ),
    "everything": EVERYTHING,
    "nothing": DraftSpec(quantised=Quantised(format=INT4)),
}


@pytest.fixture
def model() -> PreTrainedModel:
    return damped_model("llama")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Every quantised layer, in the order of construction."""
    seen: list[nn.Module] = []
    quantise = selfspec.models.draft_weights.quantise

    def counted(*args: Any, **kwargs: Any) -> QuantisedLinear:
        seen.append(quantise(*args, **kwargs))
        return seen[-1]  # type: ignore[return-value]

    monkeypatch.setattr(selfspec.models.draft_weights, "quantise", counted)
    return seen


def refuse_to_quantise(*_: Any, **__: Any) -> Any:
    raise AssertionError("the test must not quantise")


def linears_of(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, (nn.Linear, QuantisedLinear))]


@torch.inference_mode()
def draft_logits(runtime: Runtime, tokens: Tensor) -> Tensor:
    runtime.reserve(tokens.shape[0], 32)
    return runtime.run("draft", tokens)


# --- What the draft computes ---


class Rounded(nn.Module):
    """A linear layer with the dequantised weight, multiplied without a quantised kernel."""

    def __init__(self, linear: nn.Linear, format: Format) -> None:
        super().__init__()
        self.weight = QuantisedWeight.of(linear.weight, format).dequantised()
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = (inputs.bfloat16().float() @ self.weight.T).bfloat16().to(inputs.dtype)
        return outputs if self.bias is None else outputs + self.bias


def with_rounded_weights(model: PreTrainedModel, draft_spec: DraftSpec) -> PreTrainedModel:
    """The user's model with `Rounded` linear layers and zeroed skipped branches."""
    model = copy.deepcopy(model)
    assert draft_spec.quantised is not None
    for kind, index in draft_spec.quantised.sublayers:
        branch = model.get_decoder().layers[index].get_submodule("self_attn" if kind == "attn" else "mlp")
        for name, part in list(branch.named_modules()):
            if type(part) is nn.Linear:
                branch.set_submodule(name, Rounded(part, draft_spec.quantised.format))
    if draft_spec.quantised.head:
        model.lm_head = Rounded(model.lm_head, draft_spec.quantised.format)
    zero_skipped_branches(model, draft_spec.skip_set)
    return model


@torch.inference_mode()
def assert_draft_is_exact(model: PreTrainedModel, draft_spec: DraftSpec) -> None:
    tokens = few_prompts(*[19] * 16)["input_ids"]
    expected = with_rounded_weights(model, draft_spec)(tokens).logits
    skipped = DraftSpec(skip_set=draft_spec.skip_set)
    runtime = Runtime(model, skipped)
    without = draft_logits(runtime, tokens)
    changed = (expected - without).abs().mean()
    assert changed > 0.001 * without.abs().mean(), "quantisation without effect proves nothing"
    runtime.draft_with(draft_spec)
    ours = draft_logits(runtime, tokens)
    if draft_spec.vocabulary is not None:
        proposed = torch.tensor(draft_spec.vocabulary.tokens)
        ours, expected = ours[..., proposed], expected[..., proposed]
    # Sums in another order may round to another bfloat16, but rarely: only a sum within float32's error of the middle
    # between two bfloat16 does. Over many rows the mean therefore barely depends on the processor. Over few rows one
    # differently rounded sum in an early layer would decide the test.
    assert (ours - expected).abs().mean() < 0.1 * changed
    runtime.draft_with(skipped)
    assert torch.equal(draft_logits(runtime, tokens), without), "bitwise as before"


SPECIAL = {"cohere", "gemma2", "granite", "phi", "qwen2", "qwen3_moe", "starcoder2"}
"""Families with soft caps, scaled logits, biases or mixtures of experts."""
FAMILIES = [
    pytest.param(family, marks=[] if family in SPECIAL else pytest.mark.slow)
    for family in sorted(SUPPORTED_MODEL_TYPES)
]


@pytest.mark.rounding
@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_computes_the_model_with_its_weights_rounded(family: str) -> None:
    model = quantisable_model(family)
    assert_draft_is_exact(model, drafting(INT4).draft_spec)
    assert_draft_is_exact(model, drafting(INT8, trimmed=True).draft_spec)


@pytest.mark.rounding
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_everything_can_be_quantised_in_every_format(format: Format) -> None:
    model = quantisable_model("phi")
    draft_spec = DraftSpec(quantised=Quantised.everything(format, LAYERS))
    if (reason := device_unsupported_reason(format, model.device)) is not None:
        pytest.skip(reason)
    runtime = Runtime(model, draft_spec)
    view = runtime.views["draft"]
    assert all(isinstance(part, QuantisedLinear) for part in linears_of(view))
    assert_draft_is_exact(model, draft_spec)


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_head_leaves_tied_embeddings_unquantised(tied: bool) -> None:
    model = quantisable_model("llama", tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert_draft_is_exact(model, drafting(INT4).draft_spec)
    view = Runtime(model, EVERYTHING).views["draft"]
    assert view.get_input_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.rounding
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_trimmed_head_computes_the_logits_of_its_tokens_and_minus_infinity_elsewhere(
    family: str, dtype: torch.dtype
) -> None:
    model = quantisable_model(family, dtype=dtype)
    tokens = few_prompts(19)["input_ids"]
    runtime = Runtime(model)
    whole = draft_logits(runtime, tokens)
    runtime.draft_with(DraftSpec(vocabulary=PROPOSED))
    trimmed = draft_logits(runtime, tokens)
    assert trimmed.dtype == dtype
    proposed = torch.zeros(TOKENS, dtype=torch.bool)
    proposed[list(PROPOSED.tokens)] = True
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(trimmed[..., proposed], whole[..., proposed], rtol=4 * eps, atol=64 * eps)
    assert trimmed[..., ~proposed].eq(-torch.inf).all()
    assert 0 < (~proposed).sum() < TOKENS


def test_a_head_trimmed_to_all_tokens_computes_the_same_logits() -> None:
    model = quantisable_model("phi")
    tokens = few_prompts(19)["input_ids"]
    runtime = Runtime(model)
    whole = draft_logits(runtime, tokens)
    runtime.draft_with(DraftSpec(vocabulary=SubVocabulary.of(range(TOKENS), TOKENS)))
    torch.testing.assert_close(draft_logits(runtime, tokens), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.rounding
@torch.inference_mode()
def test_layers_for_many_tokens_draft_nearly_the_same() -> None:
    model = quantisable_model("llama")
    tokens = few_prompts(19)["input_ids"]
    few, many = (
        draft_logits(Runtime(model, EVERYTHING, draft_weights=DraftWeights(model, many_tokens=many_tokens)), tokens)
        for many_tokens in (False, True)
    )
    plain = model(tokens).logits
    assert (few - many).abs().max() < 0.01 * plain.abs().max()
    assert (few - plain).abs().max() > 0.05 * plain.abs().max()


def test_a_changed_draft_equals_a_fresh_draft(model: PreTrainedModel) -> None:
    tokens = few_prompts(19)["input_ids"]
    changed = Runtime(model)
    for name in ("everything", "sub-layers and trimmed head", "head", "trimmed head", "sub-layers", "everything"):
        changed.draft_with(DRAFT_SPECS[name])
        fresh = Runtime(model, DRAFT_SPECS[name])
        assert torch.equal(draft_logits(changed, tokens), draft_logits(fresh, tokens)), name


def test_an_empty_draft_spec_restores_the_model_bitwise(model: PreTrainedModel) -> None:
    tokens = few_prompts(19)["input_ids"]
    runtime = Runtime(model)
    plain = draft_logits(runtime, tokens)
    for draft_spec in DRAFT_SPECS.values():
        runtime.draft_with(draft_spec)
        runtime.draft_with(DraftSpec())
        assert torch.equal(draft_logits(runtime, tokens), plain)
        runtime.cache.reset()
        assert torch.equal(runtime.run("target", tokens), plain)


# --- The user's model ---


def test_a_quantised_draft_leaves_the_users_model_unchanged_and_usable(model: PreTrainedModel) -> None:
    given = few_prompts(13, 7, 10)
    weights = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    modules = dict(model.named_modules())
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    config = copy.deepcopy(model.config.to_dict())
    before = model.generate(**given, **GREEDY)

    spec = wrap(model, drafting(trimmed=True))
    assert torch.equal(model.generate(**given, **GREEDY), before)
    spec.generate(**given, **GREEDY)
    spec.runtime.draft_with(EVERYTHING)
    spec.runtime.draft_with(DraftSpec())

    assert torch.equal(model.generate(**given, **GREEDY), before)
    assert model.config.to_dict() == config
    assert {name: id(module) for name, module in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for name, tensor in model.state_dict(keep_vars=True).items():
        own, held = weights[name]
        assert tensor is own
        assert torch.equal(tensor, held)


def test_the_target_is_never_quantised(model: PreTrainedModel) -> None:
    target = wrap(model, Plan(skip_set=SkipSet(), quantised=EVERYTHING.quantised, gamma=2)).runtime.views["target"]
    assert all(type(part) is nn.Linear for part in linears_of(target))
    assert target.lm_head.weight is model.lm_head.weight


# --- Made once, shared, freed ---


def test_layers_are_made_once_for_all_draft_specs(model: PreTrainedModel, made: list[nn.Module]) -> None:
    draft_weights = DraftWeights(model)
    runtime = Runtime(model, drafting().draft_spec, draft_weights=draft_weights)
    linears = 3 * 4 + 3 * 3
    assert len(made) == linears + 1
    whole = drafting().draft_spec
    for draft_spec in (DraftSpec(), drafting(head=False).draft_spec, DraftSpec(skip_set=SKIPPED), whole):
        runtime.draft_with(draft_spec)
    assert len(made) == linears + 1
    runtime.draft_with(drafting(trimmed=True).draft_spec)
    assert len(made) == linears + 2


def test_runtimes_share_draft_weights(model: PreTrainedModel, made: list[nn.Module]) -> None:
    draft_weights = DraftWeights(model)
    one, other = (Runtime(model, drafting().draft_spec, draft_weights=draft_weights) for _ in range(2))
    assert one.views.draft_weights is other.views.draft_weights is draft_weights
    quantised = [{id(m) for m in runtime.views["draft"].modules() if m in made} for runtime in (one, other)]
    assert quantised[0] == quantised[1] == {id(module) for module in made}
    one.draft_with(DraftSpec())
    assert draft_weights.nbytes == draft_weight_bytes(model, drafting().draft_spec), "the other runtime uses the layers"
    assert sum(isinstance(m, QuantisedLinear) for m in other.views["draft"].modules()) == len(made)


def test_a_runtime_with_its_own_draft_weights_frees_unused_layers(
    model: PreTrainedModel, made: list[nn.Module]
) -> None:
    runtime = Runtime(model, drafting(INT4).draft_spec)
    layers = [weakref.ref(module) for module in made]
    buffers = [weakref.ref(buffer) for module in made for buffer in module.buffers()]
    made.clear()
    gc.collect()
    assert all(ref() is not None for ref in layers)
    runtime.draft_with(drafting(INT4, head=False).draft_spec)
    gc.collect()
    assert sum(ref() is None for ref in layers) == 1, "only the head is freed"
    assert runtime.views.draft_weights.nbytes == draft_weight_bytes(model, drafting(INT4, head=False).draft_spec)
    runtime.draft_with(drafting(INT8).draft_spec)
    made.clear()
    gc.collect()
    assert [ref() for ref in layers + buffers] == [None] * len(layers + buffers)
    assert runtime.views.draft_weights.nbytes == draft_weight_bytes(model, drafting(INT8).draft_spec)
    runtime.draft_with(SKIPPED)
    assert runtime.views.draft_weights.nbytes == 0


def test_layers_of_one_format_can_be_freed(model: PreTrainedModel) -> None:
    draft_weights = DraftWeights(model)
    for plan in (drafting(INT4), drafting(INT8), drafting(INT8, trimmed=True)):
        Runtime(model, plan.draft_spec, draft_weights=draft_weights)
    draft_weights.drop(INT8)
    assert draft_weights.nbytes == draft_weight_bytes(model, drafting(INT4).draft_spec)


def test_a_plan_that_only_skips_takes_no_memory(model: PreTrainedModel, made: list[nn.Module]) -> None:
    plan = Plan(skip_set=SKIPPED, gamma=3)
    spec = wrap(model, plan, draft_memory=0)
    spec.generate(**few_prompts(11), **GREEDY)
    assert (spec.stats.draft_bytes, draft_bytes(model, plan), made) == (0, 0, [])


def test_a_plan_that_never_drafts_makes_no_copies(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfspec.models.draft_weights, "quantise", refuse_to_quantise)
    plan = drafting(gamma=0)
    spec = wrap(model, plan, draft_memory=0)
    given = few_prompts(11)
    assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    assert draft_bytes(model, plan) == 0


# --- Memory ---


@pytest.mark.parametrize("name", DRAFT_SPECS)
@pytest.mark.parametrize("family", ["llama", "phi", "qwen3_moe"])
@pytest.mark.slow
def test_predicted_memory_is_exact(family: str, name: str) -> None:
    model, draft_spec = quantisable_model(family), DRAFT_SPECS[name]
    for many_tokens in (False, True):
        draft_weights = DraftWeights(model, many_tokens=many_tokens)
        view = draft_view(model, draft_spec, draft_weights)
        ours = {id(tensor): tensor for tensor in reachable_tensors(view)}
        shared = {tensor.untyped_storage().data_ptr() for tensor in reachable_tensors(model)}
        own = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in ours.values()
            if tensor.untyped_storage().data_ptr() not in shared
        }
        assert sum(own.values()) == draft_weights.nbytes == draft_weight_bytes(model, draft_spec)
    assert (draft_weight_bytes(model, draft_spec) > 0) == (name != "nothing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_predicted_memory_is_exact_in_every_format_and_dtype(format: Format, dtype: torch.dtype) -> None:
    model = quantisable_model("phi", dtype=dtype)
    for head, trimmed in ((True, False), (False, False), (True, True), (False, True)):
        plan = drafting(format, head=head, trimmed=trimmed)
        spec = wrap(model, plan)
        predicted = draft_weight_bytes(model, plan.draft_spec)
        assert spec.runtime.views.draft_weights.nbytes == draft_bytes(model, plan) == predicted > 0
        spec.generate(**few_prompts(5), do_sample=False, max_new_tokens=2)
        assert spec.stats.draft_bytes == draft_bytes(model, plan)


def test_wrapping_allocates_only_draft_weights_and_the_cache(model: PreTrainedModel) -> None:
    plan = drafting(trimmed=True)
    spec = wrap(model, plan)
    spec.generate(**few_prompts(11), **GREEDY)
    shared = {tensor.untyped_storage().data_ptr() for tensor in reachable_tensors(model)}
    tensors = [tensor for name in ("target", "draft") for tensor in reachable_tensors(spec.runtime.views[name])]
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    added = sum(size for place, size in own.items() if place not in shared)
    assert added == draft_bytes(model, plan) + spec.runtime.cache.nbytes


@pytest.mark.parametrize(("limit", "allows"), [(1024, "1 KiB"), ("1K", "1 KiB"), ("0.5KiB", "512 B"), (0, "0 B")])
def test_a_draft_above_the_memory_limit_is_refused_before_quantising(
    limit: int | str, allows: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfspec.models.draft_weights, "quantise", refuse_to_quantise)
    monkeypatch.setattr(selfspec.models.draft_weights, "TrimmedHead", refuse_to_quantise)
    for plan in (drafting(), drafting(head=False, trimmed=True)):
        needs = f"{-(-draft_bytes(model, plan) * 10 // 1024) / 10:g} KiB"
        message = (
            f"^draft_memory allows {allows}, but the draft's own layers take {needs} in addition to the model; "
            "allow more, or search for a smaller draft with that limit$"
        )
        with pytest.raises(InputError, match=message):
            wrap(model, plan, draft_memory=limit)


def test_a_draft_at_the_memory_limit_is_accepted(model: PreTrainedModel) -> None:
    plan = drafting()
    needed = draft_bytes(model, plan)
    assert wrap(model, plan, draft_memory=needed).runtime.views.draft_weights.nbytes == needed
    assert wrap(model, plan, draft_memory="1G").runtime.views.draft_weights.nbytes == needed
    with pytest.raises(InputError, match="draft_memory allows"):
        wrap(model, plan, draft_memory=needed - 1)
    check_memory(model, plan.draft_spec, None)


@pytest.mark.parametrize("limit", ["much", "", "-1K", "0"])
def test_an_invalid_memory_limit_is_refused(limit: str, model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match=f"^draft_memory is '{limit}', but a size such as 512M or 4G is expected$"):
        wrap(model, drafting(), draft_memory=limit)


# --- What cannot be quantised ---


def test_experts_stay_in_full_precision_and_stats_say_why() -> None:
    model = damped_model("qwen3_moe")
    assert quantisable(model, INT4) == QuantisedSet(attn=range(LAYERS), mlp={1})
    plan = Plan(skip_set=SkipSet(), quantised=Quantised.everything(INT4, LAYERS), gamma=2)
    spec = wrap(model, plan)
    given = few_prompts(11, 5)
    assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    assert spec.stats.slower_paths == ["of the draft, mlp 0 and 5 more not in int4: it has no linear layers"]
    mlp = decoder_layers(spec.runtime.views["draft"])[0].get_submodule("mlp")
    assert type(mlp) is type(decoder_layers(model)[0].get_submodule("mlp"))
    assert spec.stats.draft_bytes == draft_bytes(model, plan) == draft_weight_bytes(model, plan.draft_spec)


def test_layers_of_unsupported_sizes_stay_in_full_precision_and_stats_say_why() -> None:
    model = damped_model("llama", intermediate_size=80, vocab_size=211)
    plan = drafting(INT4)
    assert quantisable(model, INT4) == QuantisedSet(attn=range(LAYERS), mlp=range(LAYERS)), (
        "the sizes of gate and up are supported"
    )
    assert unsupported_reasons(model, plan.draft_spec) == [
        "mlp 1's down_proj and 2 more not in int4: int4 in groups of 32 takes inputs in multiples of 32 and outputs of "
        "16, but it has 80 and 96",
        "the head not in int4: int4 in groups of 32 takes inputs in multiples of 32 and outputs of 16, but it has 96 "
        "and 211",
    ]
    assert len(unsupported_reasons(model, drafting(INT8).draft_spec)) == 1
    assert (
        unsupported_reasons(model, drafting(INT4, head=False).draft_spec)
        == unsupported_reasons(model, plan.draft_spec)[:1]
    )
    assert unsupported_reasons(model, DraftSpec(skip_set=SKIPPED)) == []
    spec = wrap(model, plan)
    given = few_prompts(13, 7, 10)
    assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    assert spec.stats.slower_paths == [f"of the draft, {line}" for line in unsupported_reasons(model, plan.draft_spec)]
    assert spec.runtime.views.draft_weights.nbytes == draft_bytes(model, plan)
    assert type(spec.runtime.views["draft"].lm_head) is nn.Linear


def test_kernels_are_never_called_with_unsupported_sizes(made: list[nn.Module]) -> None:
    # Some kernels read outside the weight for unsupported sizes, and crash.
    model = quantisable_model("llama", intermediate_size=40, vocab_size=211, hidden_size=72, head_dim=20)
    assert quantisable(model, INT4) == quantisable(model, INT8) == QuantisedSet()
    for format in FORMATS:
        draft_spec = DraftSpec(quantised=Quantised.everything(format, LAYERS))
        assert len(unsupported_reasons(model, draft_spec)) >= 1
        assert draft_weight_bytes(model, draft_spec) == 0
        spec = wrap(model, Plan(skip_set=SkipSet(), quantised=draft_spec.quantised, gamma=2))
        spec.generate(**few_prompts(5), do_sample=False, max_new_tokens=5)
    assert made == []


def test_a_head_trimmed_to_an_unsupported_size_stays_in_full_precision(made: list[nn.Module]) -> None:
    model = quantisable_model("llama")
    draft_spec = DRAFT_SPECS["a trimmed head of an unsupported size"]
    head = Runtime(model, draft_spec).views["draft"].lm_head
    assert isinstance(head, TrimmedHead)
    assert made == []
    assert unsupported_reasons(model, draft_spec) != []


# --- What the user does to the model after wrapping ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.slow
def test_casting_the_model_rebuilds_the_draft_weights(family: str, trimmed: bool, dtype: torch.dtype) -> None:
    model = damped_model(family)
    plan = drafting(INT8, trimmed=trimmed)
    spec = wrap(model, plan)
    given = few_prompts(13, 7, 10)
    first = spec.generate(**given, **GREEDY)
    old = weakref.ref(spec.runtime.views.draft_weights)
    model.to(dtype)
    ours = spec.generate(**given, **GREEDY)
    gc.collect()
    assert old() is None
    assert spec.runtime.views.draft_weights.nbytes == draft_bytes(model, plan)
    assert 0 < spec.stats.accepted < spec.stats.drafted
    if dtype == torch.float64:
        assert torch.equal(ours, model.generate(**given, **GREEDY))
        assert torch.equal(ours, first)
    fresh = Runtime(model, plan.draft_spec)
    tokens = given["input_ids"]
    assert torch.equal(draft_logits(spec.runtime, tokens), draft_logits(fresh, tokens))
    assert draft_logits(fresh, tokens).dtype == dtype


def test_draft_weights_are_kept_while_the_model_does_not_change(model: PreTrainedModel, made: list[nn.Module]) -> None:
    spec = wrap(model, drafting())
    count, draft_weights = len(made), spec.runtime.views.draft_weights
    for seed in range(3):
        spec.generate(**few_prompts(11, 5, seed=seed), **GREEDY)
    assert spec.runtime.views.draft_weights is draft_weights
    assert len(made) == count


# --- Plans that do not fit ---


@pytest.mark.parametrize(
    ("tokens", "has"), [([3, TOKENS], "token 208"), (range(TOKENS + 80), f"token {TOKENS + 79}"), ([], "no token")]
)
def test_a_draft_vocabulary_outside_the_models_is_refused(tokens: Any, has: str, model: PreTrainedModel) -> None:
    draft_spec = DraftSpec(vocabulary=SubVocabulary.of(tokens, 1000))
    message = rf"^draft_vocabulary has {has}, but this model has 0\.\.207; run 'selfspec search' on this model$"
    attempts: list[Callable[[], Any]] = [
        lambda: check_vocabulary(model, draft_spec),
        lambda: Runtime(model, draft_spec),
        lambda: Runtime(model).draft_with(draft_spec),
    ]
    if tokens:
        plan = Plan(skip_set=SkipSet(), gamma=2, draft_vocabulary=draft_spec.vocabulary.code)
        attempts.append(lambda: wrap(model, plan))
    for attempt in attempts:
        with pytest.raises(PlanError, match=message):
            attempt()
    check_vocabulary(model, DraftSpec(vocabulary=SubVocabulary.of([TOKENS - 1], 1000)))
    check_vocabulary(model, DraftSpec())


def test_a_quantised_layer_outside_the_model_is_refused(model: PreTrainedModel) -> None:
    plan = Plan(skip_set=SkipSet(), quantised=Quantised(format=INT8, sublayers=QuantisedSet(mlp={3, 7})), gamma=2)
    with pytest.raises(PlanError, match=r"^quantised set names mlp layer 7, but this model has 7 \(0\.\.6\)$"):
        wrap(model, plan)
    with pytest.raises(PlanError, match="mlp layer 7"):
        draft_bytes(model, plan)


def test_a_refused_draft_spec_does_not_change_the_draft(model: PreTrainedModel) -> None:
    plan = drafting(INT8)
    spec: SelfSpeculator = wrap(model, plan)
    given = few_prompts(13, 7, 10)
    spec.generate(**given, **GREEDY)
    history, memory = spec.stats.history, spec.runtime.views.draft_weights.nbytes
    for bad in (
        DraftSpec(vocabulary=SubVocabulary.of([TOKENS], 1000)),
        DraftSpec(quantised=Quantised(format=INT4, sublayers=QuantisedSet(attn={9}))),
        SkipSet(mlp={7}),
    ):
        with pytest.raises(PlanError):
            spec.runtime.draft_with(bad)
        assert spec.runtime.draft_spec == plan.draft_spec
    spec.generate(**given, **GREEDY)
    assert spec.stats.history == history
    assert spec.runtime.views.draft_weights.nbytes == memory
    model.to(torch.float64)  # rebuilds the views with the old draft spec
    spec.generate(**given, **GREEDY)
    assert spec.runtime.views.draft_weights.nbytes == memory


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank adapter that reads its weights as peft does."""

    def __init__(self, base: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base
        sizes = (base.in_features, rank), (rank, base.out_features)
        self.lora_A, self.lora_B = (torch.nn.ModuleDict({"default": torch.nn.Linear(*size)}) for size in sizes)

    def forward(self, inputs: Tensor) -> Tensor:
        down, up = self.lora_A["default"], self.lora_B["default"]
        return self.base_layer(inputs) + up(down(inputs.to(down.weight.dtype)))


@pytest.mark.parametrize("rank", [8, 16, 32])
def test_layers_with_adapters_stay_in_full_precision(rank: int) -> None:
    model = quantisable_model("llama")
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj, rank)
    spec, given = wrap(model, drafting(INT4)), few_prompts(13, 7, 10)
    assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    copied = {key[2] for key in spec.runtime.views.draft_weights._made if key[0] == "attn"}
    assert copied == {"k_proj", "v_proj", "o_proj"}


def test_after_a_refused_rebuild_the_next_request_rebuilds_the_views(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantisable_model("llama")
    spec, given = wrap(model, drafting(INT8)), few_prompts(13, 7, 10)
    expected = spec.generate(**given, **GREEDY)
    norm = model.model.norm
    kept, norm.weight = norm.weight, torch.nn.Parameter(torch.full_like(norm.weight, torch.nan))
    with pytest.raises(UnsupportedModelError, match="NaN or infinity"):
        spec.generate(**given, **GREEDY)
    norm.weight = kept
    assert torch.equal(spec.generate(**given, **GREEDY), expected)
