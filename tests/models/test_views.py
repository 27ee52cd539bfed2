"""Views share every tensor with the user's model, never change the model, and refuse unsupported models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from models import CACHE, ENDS_SKIPPED, FIRST_DROPPED, LAYERS, VOCABULARY, damped_model, prompts, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, PreTrainedModel, T5Config
from transformers import T5ForConditionalGeneration as T5

import selfspec.runtime.prefill
from selfspec import Plan, SelfSpeculator, SkipSet, UnsupportedModelError, wrap
from selfspec.models.draft_view import attention_modules, change_draft, draft_view
from selfspec.models.probe import probe
from selfspec.models.rope import longrope_switch, pin_longrope
from selfspec.models.views import decoder_layers, reachable_tensors, target_view
from selfspec.runtime.runtime import Runtime

PLAN = Plan(skip_set=ENDS_SKIPPED, gamma=3)
GREEDY = {"do_sample": False, "max_new_tokens": 17}


@pytest.fixture
def model() -> PreTrainedModel:
    return damped_model("llama", ENDS_SKIPPED)


def assert_lossless(spec: SelfSpeculator, model: PreTrainedModel, *lengths: int, **options: Any) -> Tensor:
    tokens, mask = prompts(*lengths)
    options = GREEDY | options | {"attention_mask": mask}
    ours = spec.generate(tokens, **options)
    assert torch.equal(ours, model.generate(tokens, **options))
    return ours


def storages(module: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in reachable_tensors(module)}


# --- Sharing ---


def test_views_hold_the_models_tensors_and_no_others(model: PreTrainedModel) -> None:
    tied = tiny_model("llama", tie_word_embeddings=True)
    assert target_view(tied).lm_head.weight is tied.get_input_embeddings().weight
    for view in (target_view(model), draft_view(model, SkipSet())):
        assert storages(view) == storages(model)
        for name, parameter in model.named_parameters():
            assert view.get_parameter(name) is parameter
        for name, buffer in model.named_buffers():
            assert view.get_buffer(name) is buffer


def test_views_share_tensors_that_are_neither_parameters_nor_buffers(model: PreTrainedModel) -> None:
    class QuantiserState:
        def __init__(self) -> None:
            self.scales = {"blocks": [torch.ones(3)]}

        def __call__(self, x: Tensor) -> Tensor:
            return x

    projection = model.get_submodule("model.layers.2.mlp.down_proj")
    projection.state = QuantiserState()  # type: ignore[assignment]
    projection.codebook = (torch.ones(5),)  # type: ignore[assignment]
    copied = target_view(model).get_submodule("model.layers.2.mlp.down_proj")
    assert copied.state.scales["blocks"][0] is projection.state.scales["blocks"][0]
    assert copied.codebook[0] is projection.codebook[0]


def test_a_draft_view_runs_only_the_layers_that_keep_a_sub_layer(model: PreTrainedModel) -> None:
    view = draft_view(model, ENDS_SKIPPED)
    assert [module.layer_idx for module in attention_modules(view)] == [1, 4, 5]
    assert len(decoder_layers(view)) == view.config.num_hidden_layers == LAYERS - 2


def test_dropped_layers_lose_their_entries_in_every_list_of_the_config() -> None:
    model = tiny_model("gemma3_text")
    kinds = model.config.layer_types
    view = draft_view(model, SkipSet(attn={1, 3}, mlp={0, 1, 3}))
    assert view.config.layer_types == [kinds[i] for i in (0, 2, 4, 5, 6)]
    assert model.config.layer_types == kinds
    assert len(kinds) == LAYERS


# --- The user's model does not change ---


def test_the_users_model_does_not_change_while_wrapped_or_after_generating(model: PreTrainedModel) -> None:
    tokens, mask = prompts(13, 7, 10)
    options = GREEDY | {"attention_mask": mask}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, generation_config = copy.deepcopy(model.config.to_dict()), model.generation_config.to_dict()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    before = model.generate(tokens, **options)

    spec = wrap(model, PLAN)
    assert torch.equal(model.generate(tokens, **options), before)
    stream = spec.stream(tokens[:1], max_new_tokens=9)
    next(stream)
    assert torch.equal(model.generate(tokens, **options), before)  # while a stream is open
    stream.close()
    spec.generate(tokens, **options)

    assert torch.equal(model.generate(tokens, **options), before)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert model.generation_config.to_dict() == generation_config
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_every_module_keeps_its_training_mode(model: PreTrainedModel) -> None:
    model.train()
    model.get_submodule("model.layers.3").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    spec = wrap(model, PLAN)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module.training for module in spec.runtime.views["target"].modules())


def test_the_users_hooks_never_run_in_the_views(model: PreTrainedModel) -> None:
    calls: list[str] = []
    attention = decoder_layers(model)[1].get_submodule("self_attn")
    handles = [
        attention.register_forward_hook(lambda *_: calls.append("after")),
        attention.register_forward_pre_hook(lambda *_: calls.append("before")),
        attention.register_forward_hook(lambda module, args, kwargs, output: calls.append("kw"), with_kwargs=True),
        attention.register_full_backward_hook(lambda *_: None),
    ]
    runtime = Runtime(model, ENDS_SKIPPED)
    calls.clear()
    runtime.reserve(1, 16)
    runtime.run("target", prompts(7)[0])
    runtime.run("draft", prompts(7)[0])
    assert calls == []
    model(prompts(7)[0])
    assert calls == ["before", "after", "kw"]
    for handle in handles:
        handle.remove()


# --- Changing what is skipped ---


def test_a_changed_skip_set_equals_a_fresh_view() -> None:
    model = tiny_model("gemma3_text")
    tokens, _ = prompts(19)
    changed, fresh = Runtime(model, ENDS_SKIPPED), {s: Runtime(model, s) for s in (ENDS_SKIPPED, FIRST_DROPPED)}
    runs = []
    for skip_set in (ENDS_SKIPPED, FIRST_DROPPED, SkipSet(), ENDS_SKIPPED):
        changed.draft_with(skip_set)
        logits = draft_logits(changed, tokens)
        if skip_set:
            torch.testing.assert_close(logits, draft_logits(fresh[skip_set], tokens), rtol=0, atol=0)
        runs.append(logits)
    assert torch.equal(runs[0], runs[3])
    assert not torch.equal(runs[0], runs[1])
    torch.testing.assert_close(runs[2], model(tokens).logits, rtol=1e-4, atol=1e-4)


def draft_logits(runtime: Runtime, tokens: Tensor) -> Tensor:
    runtime.reserve(tokens.shape[0], 32)
    return runtime.run("draft", tokens)


def test_a_refused_skip_set_does_not_change_the_view(model: PreTrainedModel) -> None:
    view = draft_view(model, ENDS_SKIPPED)
    with pytest.raises(selfspec.PlanError, match=r"mlp layer 7, but this model has 7 \(0\.\.6\)"):
        change_draft(view, SkipSet(mlp={7}))
    assert len(decoder_layers(view)) == LAYERS - 2


def test_all_sub_layers_can_be_skipped(model: PreTrainedModel) -> None:
    spec = wrap(model, Plan(skip_set=SkipSet.early_exit(0, LAYERS), gamma=2))
    assert_lossless(spec, model, 7)
    assert spec.stats.drafted > 0


# --- Refusals ---


@pytest.mark.parametrize("family", ["stablelm", "nemotron", "gpt_neox", "falcon"])
def test_families_that_are_not_supported_are_refused_by_name(family: str) -> None:
    from transformers import CONFIG_MAPPING

    sizes = {"hidden_size": 24, "intermediate_size": 23, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CONFIG_MAPPING[family](vocab_size=23, num_key_value_heads=2, **sizes)
    with pytest.raises(UnsupportedModelError, match=f"model type '{family}' is not supported; supported are apertus"):
        wrap(AutoModelForCausalLM.from_config(config), PLAN)


def changed(change: Callable[[PreTrainedModel], object], **options: Any) -> PreTrainedModel:
    model = tiny_model("llama", **options)
    change(model)
    return model


def bias_of(value: float) -> Tensor:
    return torch.where(torch.arange(VOCABULARY) < VOCABULARY - 3, 0.0, value)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
OFFLOADED = {"model.layers.0": "cpu", "model.layers.1": "disk"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(3, 5), "a Hugging Face causal language model, but Linear was given"),
        (lambda: LlamaModel(tiny_model("llama").config), "LlamaModel has no language-model head"),
        (
            lambda: T5(T5Config(d_model=16, d_kv=8, d_ff=17, num_layers=1, num_heads=2, vocab_size=23)),
            "'t5' is an encoder-decoder model",
        ),
        (lambda: tiny_model("llama", rope_parameters=DYNAMIC), "RoPE of type 'dynamic'"),
        (
            lambda: changed(lambda model: decoder_layers(model)[6].to("meta")),
            "spread over cpu, meta; selfspec needs it whole on one device",
        ),
        (lambda: changed(lambda model: setattr(model, "hf_device_map", OFFLOADED)), "spread over cpu, disk"),
        (
            lambda: changed(lambda model: model.lm_head.weight.data[3].fill_(torch.nan)),
            "the model's own logits hold NaN or infinity",
        ),
        (
            lambda: changed(lambda model: model.lm_head.weight.data[3].fill_(torch.inf)),
            "the model's own logits hold NaN or infinity",
        ),
        (
            lambda: changed(lambda model: model.lm_head.register_parameter("bias", nn.Parameter(bias_of(torch.inf)))),
            "the model's own logits hold NaN or infinity",
        ),
        (
            lambda: changed(
                lambda model: model.lm_head.register_forward_hook(lambda *_: torch.full((1, 11, 211), -torch.inf))
            ),
            "the model's own logits hold NaN or infinity",
        ),
    ],
)
def test_unsupported_models_are_refused_with_the_reason(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        wrap(make(), PLAN)


class Narrow(LlamaForCausalLM):
    """Takes the arguments that `generate` gives, and no others."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def narrowed(select: Callable[[PreTrainedModel], nn.Module], *, takes: bool = False) -> PreTrainedModel:
    """A model in which the forward of one module takes no further arguments, or drops them."""
    model = tiny_model("llama")
    module, names = select(model), ("attention_mask", "position_ids", "position_embeddings", "use_cache", CACHE)
    inner = type(module).forward

    def narrow(self: nn.Module, hidden_states: Any = None, attention_mask: Any = None, position_embeddings: Any = None):  # type: ignore[no-untyped-def]
        return inner(self, hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings)

    def drops(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return inner(self, *args, **{name: value for name, value in kwargs.items() if name in names})

    module.forward = MethodType(drops if takes else narrow, module)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Narrow(tiny_model("llama").config).eval(),
            r"the forward of Narrow \(the model itself\) takes no \*\*kwargs",
        ),
        (
            lambda: narrowed(lambda model: decoder_layers(model)[2]),
            r"the forward of LlamaDecoderLayer \(model.layers.2\) takes no \*\*kwargs.*add \*\*kwargs",
        ),
        (
            lambda: narrowed(lambda model: decoder_layers(model)[5].self_attn),
            r"the forward of LlamaAttention \(model.layers.5.self_attn\) takes no \*\*kwargs",
        ),
        (
            lambda: narrowed(lambda model: decoder_layers(model)[2], takes=True),
            r"attention of layer 2 cannot be reached: a forward above it drops its \*\*kwargs",
        ),
    ],
)
def test_a_forward_that_keeps_the_pass_from_attention_is_refused_by_name(
    make: Callable[[], PreTrainedModel], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as error:
        wrap(make(), PLAN)
    assert "\n" not in str(error.value)


def test_a_subclass_that_hands_its_arguments_on_is_decoded() -> None:
    class Scaled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 0.5
            return output

    model = Scaled(tiny_model("llama").config).eval()
    assert_lossless(wrap(model, PLAN), model, 11, 5)


def test_a_model_moved_to_another_device_after_wrapping_is_refused_at_the_next_call(model: PreTrainedModel) -> None:
    spec = wrap(model, PLAN)
    decoder_layers(model)[0].to("meta")
    with pytest.raises(UnsupportedModelError, match="spread over cpu, meta"):
        spec.generate(prompts(7)[0], **GREEDY)


def test_a_model_that_the_view_does_not_reproduce_is_refused_with_the_difference(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = type(decoder_layers(model)[0].self_attn).forward

    def ignores_the_implementation(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output, weights = forward(self, *args, **kwargs)
        return output * (1.01 if self.config._attn_implementation == "selfspec" else 1.0), weights

    monkeypatch.setattr(type(decoder_layers(model)[0].self_attn), "forward", ignores_the_implementation)
    pattern = r"this 'llama' cannot be reproduced: the largest logit difference on a short input is [\d.e-]+, where"
    with pytest.raises(UnsupportedModelError, match=pattern):
        wrap(model, PLAN)


def test_a_model_whose_forward_was_replaced_is_refused(model: PreTrainedModel) -> None:
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(UnsupportedModelError, match=r"model\.forward was replaced \(.*lambda\).*before"):
        wrap(model, PLAN)


def test_a_layer_whose_replaced_forward_calls_the_users_attention_is_refused(model: PreTrainedModel) -> None:
    attention = decoder_layers(model)[3].self_attn
    attention.forward = partial(attention.forward)  # type: ignore[arg-type, operator]
    wrap(model, PLAN)  # a copied partial calls the copy
    attention.forward = lambda *args, forward=attention.forward, **kwargs: forward(*args, **kwargs)
    with pytest.raises(UnsupportedModelError, match=r"attention of layer 3 cannot be reached .* wrap the model before"):
        wrap(model, PLAN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_probe_passes_with_every_attention_implementation(implementation: str, dtype: torch.dtype) -> None:
    model = tiny_model("qwen3", dtype=dtype)
    model.set_attn_implementation(implementation)
    recorded = probe(model, target_view(model))
    assert set(recorded.shapes) == set(range(LAYERS))
    assert {window for window, _ in recorded.masks} == {None, 5}


@pytest.mark.parametrize(("implementation", "cap"), [("sdpa", None), ("eager", 1.5)])
def test_a_view_of_an_sdpa_model_ignores_the_soft_cap_as_sdpa_does(implementation: str, cap: float | None) -> None:
    model = tiny_model("gemma2")
    model.config._attn_implementation = implementation  # newer transformers refuse this choice
    assert {module.attn_logit_softcapping for module in attention_modules(target_view(model))} == {cap}
    assert {module.attn_logit_softcapping for module in attention_modules(model)} == {1.5}


# --- What the user does to the model after wrapping ---


def test_casting_the_model_rebuilds_the_views(model: PreTrainedModel) -> None:
    spec = wrap(model, PLAN)
    first = assert_lossless(spec, model, 13, 7, 10)
    target = spec.runtime.views["target"]
    model.to(torch.float64)
    assert torch.equal(assert_lossless(spec, model, 13, 7, 10), first)
    assert spec.runtime.views["target"] is not target
    assert spec.runtime.cache.layer(0)[0].dtype == torch.float64
    assert storages(model) <= storages(spec.runtime.views["target"])


def test_views_are_kept_while_the_model_does_not_change(model: PreTrainedModel) -> None:
    spec = wrap(model, PLAN)
    assert_lossless(spec, model, 7)
    target = spec.runtime.views["target"]
    assert_lossless(spec, model, 11)
    assert spec.runtime.views["target"] is target


def test_views_see_weights_changed_in_place(model: PreTrainedModel) -> None:
    spec = wrap(model, PLAN)
    before = assert_lossless(spec, model, 7)
    with torch.no_grad():  # as when an adapter is merged
        decoder_layers(model)[1].get_submodule("mlp.down_proj").weight.mul_(-2)
    assert not torch.equal(assert_lossless(spec, model, 7), before)


class Adapted(nn.Module):
    """A linear layer with an adapter that can be switched off."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.extra = base, nn.Linear(base.in_features, base.out_features, bias=False)
        self.off = False

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.off else self.base(x) + self.extra(x)  # type: ignore[no-any-return]


def test_views_are_rebuilt_when_an_adapter_is_added_or_switched_off(model: PreTrainedModel) -> None:
    spec = wrap(model, PLAN)
    before = assert_lossless(spec, model, 7)
    mlp = decoder_layers(model)[1].get_submodule("mlp")
    mlp.down_proj = Adapted(mlp.down_proj)
    assert not torch.equal(assert_lossless(spec, model, 7), before)
    mlp.down_proj.off = True
    assert torch.equal(assert_lossless(spec, model, 7), before)


# --- RoPE ---

SWITCH = 24
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 3.0, 5.0, 7.0, 11.0, 13.0],
    "original_max_position_embeddings": SWITCH,
    "factor": 4.0,
}


@pytest.fixture
def longrope() -> PreTrainedModel:
    return damped_model(
        "phi3",
        ENDS_SKIPPED,
        rope_parameters=dict(LONGROPE),
        original_max_position_embeddings=SWITCH,
        max_position_embeddings=4 * SWITCH,
        sliding_window=None,
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rope_equals_model_generate_beyond_the_original_length(rope: dict[str, Any]) -> None:
    model = damped_model("llama", ENDS_SKIPPED, rope_parameters={"rope_theta": 100.0} | rope)
    spec = wrap(model, PLAN)
    ours = assert_lossless(spec, model, 13, 7, 10)
    assert 0 < spec.stats.accepted < spec.stats.drafted
    assert not torch.equal(ours, damped_model("llama", ENDS_SKIPPED).generate(prompts(13, 7, 10)[0], **GREEDY))


@pytest.mark.parametrize("lengths", [(5, 3), (SWITCH + 1, SWITCH + 7), (SWITCH + 1, 5)], ids=["short", "long", "mixed"])
def test_longrope_is_decoded_on_both_sides_of_the_switch(longrope: PreTrainedModel, lengths: tuple[int, ...]) -> None:
    spec = wrap(longrope, PLAN)
    assert longrope_switch(longrope) == SWITCH
    for row in ([5], lengths, [SWITCH + 3], lengths):  # one side of the switch after the other
        assert_lossless(spec, longrope, *row, max_new_tokens=13)
        assert spec.stats.slower_paths == []
    assert 0 < spec.stats.accepted < spec.stats.drafted


def test_prefill_in_chunks_uses_the_long_factors_for_a_prompt_above_the_switch(
    longrope: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first chunks have no position above the switch: Hugging Face would use the short factors.
    monkeypatch.setattr(selfspec.runtime.prefill, "CPU_CHUNK", 7)
    spec = wrap(longrope, PLAN)
    assert_lossless(spec, longrope, SWITCH + 9, SWITCH + 2, max_new_tokens=11)


def test_a_cast_model_keeps_the_long_factors(longrope: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfspec.runtime.prefill, "CPU_CHUNK", 7)
    spec = wrap(longrope, PLAN)
    longrope.to(torch.float64)
    assert_lossless(spec, longrope, SWITCH + 9, max_new_tokens=11)


def test_pinning_longrope_changes_the_view_and_not_the_users_model(longrope: PreTrainedModel) -> None:
    view = target_view(longrope)
    rotary, users = view.model.rotary_emb, longrope.model.rotary_emb
    before = users.inv_freq.clone()
    plain = 100.0 ** (-torch.arange(0, 12, 2) / 12)
    for long, factors in ((False, "short_factor"), (True, "long_factor"), (False, "short_factor")):
        pin_longrope(view, long=long)
        torch.testing.assert_close(rotary.inv_freq, plain / torch.tensor(LONGROPE[factors]))
        rotary(torch.zeros(1, 1, 72), torch.tensor([[SWITCH * 2]]))  # an unpinned view would switch here
        torch.testing.assert_close(rotary.inv_freq, plain / torch.tensor(LONGROPE[factors]))
    assert torch.equal(users.inv_freq, before)
    assert users.rope_type == "longrope"


def test_pinning_does_not_change_other_rope_types(model: PreTrainedModel) -> None:
    view = target_view(model)
    pin_longrope(view, long=True)
    assert longrope_switch(model) is None
    assert view.model.rotary_emb.inv_freq is model.model.rotary_emb.inv_freq
