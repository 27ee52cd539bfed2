"""Views never go stale: a change of what the user's model computes is followed, refused, or left to model.generate."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from models import ENDS_SKIPPED, damped_model, prompts, tiny_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from transformers import AttentionInterface, PreTrainedModel

from selfspec import Plan, SelfSpeculator, UnsupportedModelError, wrap
from selfspec.errors import UnsupportedOptionError
from selfspec.models.model_state import ModelState
from selfspec.models.views import decoder_layers
from selfspec.runtime.runtime import Runtime

PLAN = Plan(skip_set=ENDS_SKIPPED, gamma=3)
GREEDY = {"do_sample": False, "max_new_tokens": 17}


@pytest.fixture
def model() -> PreTrainedModel:
    return damped_model("llama", ENDS_SKIPPED)


def steer(module: nn.Module, args: Any, output: Any) -> Any:
    return (output[0] * 1.5 + 1.0, *output[1:]) if isinstance(output, tuple) else output * 1.5 + 1.0


def halve(module: nn.Module, args: Any) -> Any:
    return (args[0] * 0.5, *args[1:])


def both(spec: SelfSpeculator, model: PreTrainedModel, length: int = 7) -> tuple[Tensor, Tensor]:
    tokens, mask = prompts(length)
    options = GREEDY | {"attention_mask": mask}
    return spec.generate(tokens, **options), model.generate(tokens, **options)  # type: ignore[return-value]


def assert_follows(model: PreTrainedModel, change: Callable[[], Any], *, speculates: bool = True) -> SelfSpeculator:
    """The text changes with the model, and is that of the changed model."""
    spec = wrap(model, PLAN)
    before, theirs = both(spec, model)
    assert torch.equal(before, theirs)
    change()
    ours, theirs = both(spec, model)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, before), "the change decides nothing, so the test proves nothing"
    assert bool(spec.stats.drafted) == speculates
    return spec


# --- Hooks ---


@pytest.mark.parametrize(
    ("path", "kind", "hook"),
    [
        ("model.layers.1", "hook", steer),
        ("model.layers.2.self_attn", "hook", steer),
        ("model.layers.1.mlp.act_fn", "hook", steer),
        ("model.layers.3.mlp", "pre-hook", halve),
        ("model.embed_tokens", "hook", steer),
        ("model.norm", "hook", lambda module, args, output: output.flip(-1)),
        ("lm_head", "hook", lambda module, args, output: output.roll(1, -1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_model_generate_decodes_while_a_module_has_a_hook(
    model: PreTrainedModel, path: str, kind: str, hook: Callable[..., Any]
) -> None:
    module, handles = model.get_submodule(path), []
    register = module.register_forward_hook if kind == "hook" else module.register_forward_pre_hook
    spec = assert_follows(model, lambda: handles.append(register(hook)), speculates=False)
    name = hook.__name__.strip("<>")
    assert any(f"{path} has a forward {kind} (" in line and name in line for line in spec.stats.slower_paths)
    handles[0].remove()
    ours, theirs = both(spec, model)
    assert torch.equal(ours, theirs)
    assert spec.stats.drafted


def test_a_hook_of_all_modules_counts(model: PreTrainedModel) -> None:
    handles: list[Any] = []

    def act(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 0.5 if isinstance(module, nn.Linear) else None

    try:
        spec = assert_follows(model, lambda: handles.append(register_module_forward_hook(act)), speculates=False)
        assert "every module of this process has a forward hook: model.generate decodes it" in spec.stats.slower_paths
    finally:
        handles[0].remove()


def test_a_hook_that_is_there_at_wrap_and_acts_later_is_not_missed(model: PreTrainedModel) -> None:
    acts = []
    model.model.layers[1].register_forward_hook(lambda *call: steer(*call) if acts else None)
    assert_follows_plainly = wrap(model, PLAN)
    before, theirs = both(assert_follows_plainly, model)
    assert torch.equal(before, theirs)
    acts.append(True)
    ours, theirs = both(assert_follows_plainly, model)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, before)


def test_a_hook_that_acts_in_passes_of_one_token_only_is_not_missed(model: PreTrainedModel) -> None:
    def act(module: nn.Module, args: Any, output: Any) -> Any:
        return steer(module, args, output) if output.shape[1] == 1 else None

    assert_follows(model, lambda: model.model.layers[1].mlp.register_forward_hook(act), speculates=False)


def test_a_hook_that_acts_at_wrap_is_refused_by_name(model: PreTrainedModel) -> None:
    model.model.layers[2].mlp.register_forward_hook(steer)
    with pytest.raises(
        UnsupportedModelError, match=r"model\.layers\.2\.mlp has a forward hook \(steer\): wrap .* before"
    ):
        wrap(model, PLAN)


def test_a_pruned_model_is_not_decoded_with_a_stale_mask(model: PreTrainedModel) -> None:
    assert_follows(
        model,
        lambda: prune.l1_unstructured(model.model.layers[1].mlp.down_proj, "weight", amount=0.7),
        speculates=False,
    )


def test_hooks_of_hugging_faces_own_output_capturing_do_not_stop_speculation(model: PreTrainedModel) -> None:
    spec = wrap(model, PLAN)
    model(prompts(7)[0], output_hidden_states=True)  # installs hooks that stay
    ours, theirs = both(spec, model)
    assert torch.equal(ours, theirs)
    assert spec.stats.drafted


def test_a_stream_of_a_hooked_model_is_refused(model: PreTrainedModel) -> None:
    spec = wrap(model, PLAN)
    model.model.layers[1].register_forward_hook(steer)
    with pytest.raises(UnsupportedOptionError, match=r"model\.layers\.1 has a forward hook .* use generate"):
        next(spec.stream(prompts(7)[0], **GREEDY))


# --- Replaced forwards ---


def scaled(forward: Callable[..., Any], factor: float) -> Callable[..., Any]:
    return lambda *args, **kwargs: forward(*args, **kwargs) * factor


@pytest.mark.parametrize("path", ["model.layers.1.mlp", "model.layers.1.mlp.up_proj", "model.norm", "lm_head"])
def test_a_replaced_forward_of_a_module_is_followed(model: PreTrainedModel, path: str) -> None:
    module = model.get_submodule(path)
    assert_follows(model, lambda: setattr(module, "forward", scaled(module.forward, -3.0)))


def test_a_replaced_method_of_a_module_runs_on_the_views_module(model: PreTrainedModel) -> None:
    attention = model.model.layers[1].self_attn
    forward = type(attention).forward

    def louder(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output, weights = forward(self, *args, **kwargs)
        return output * 4.0, weights

    assert_follows(model, lambda: setattr(attention, "forward", MethodType(louder, attention)))


def test_a_replaced_class_is_followed(model: PreTrainedModel) -> None:
    mlp = model.model.layers[1].mlp

    class Louder(type(mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * 4.0

    assert_follows(model, lambda: setattr(mlp, "__class__", Louder))


def test_model_generate_decodes_while_the_whole_models_forward_is_replaced(model: PreTrainedModel) -> None:
    forward = model.forward

    def reversed_logits(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = -output.logits
        return output

    spec = assert_follows(model, lambda: setattr(model, "forward", reversed_logits), speculates=False)
    assert any("model.forward was replaced (test_model" in line for line in spec.stats.slower_paths)
    del model.forward
    ours, theirs = both(spec, model)
    assert torch.equal(ours, theirs)
    assert spec.stats.drafted


@pytest.mark.slow
def test_a_compiled_forward_of_the_model_is_its_own(model: PreTrainedModel) -> None:
    model.forward = torch.compile(model.forward, backend="eager")
    assert wrap(model, PLAN).runtime.follow() is None
    assert "forward" not in vars(wrap(model, PLAN).runtime.views["target"])


def test_a_forward_that_acts_by_the_length_of_the_pass_is_refused(model: PreTrainedModel) -> None:
    mlp = model.model.layers[1].mlp
    forward, spec = mlp.forward, wrap(model, PLAN)
    mlp.forward = lambda x: forward(x) * (3.0 if x.shape[1] == 1 else 1.0)
    with pytest.raises(UnsupportedModelError, match="logits of the same tokens depend on the length of the pass"):
        both(spec, model)


def test_with_a_replaced_forward_passes_are_neither_compiled_nor_captured(model: PreTrainedModel) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = scaled(mlp.forward, 1.0)
    runtime = Runtime(model, ENDS_SKIPPED, compile=True)
    assert not runtime.passes.compile
    assert "model.layers.1.mlp.forward was replaced (scaled" in str(runtime.passes.uncompiled_reason)


# --- Attributes, objects and settings ---


class Mixed(nn.Module):
    """A layer that computes with attributes of every kind."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scale = torch.ones(())
        self.table = np.ones(1, dtype=np.float32)
        self.factors = {"default": [1.0]}
        self.control = Control()
        self.pair = (Control(), 1)
        self.lock = threading.Lock()  # cannot be copied

    def forward(self, x: Tensor) -> Tensor:
        factor = self.scale * float(self.table[0]) * self.factors["default"][0] * self.control.strength
        return self.base(x) * (factor * self.control.nested["deep"].strength * self.pair[0].strength)  # type: ignore[no-any-return]


@dataclass
class Inner:
    strength: float = 1.0


@dataclass
class Control:
    strength: float = 1.0
    nested: dict[str, Inner] = field(default_factory=lambda: {"deep": Inner()})


CHANGES: dict[str, Callable[[Mixed], Any]] = {
    "tensor": lambda m: setattr(m, "scale", torch.tensor(4.0)),
    "tensor in place": lambda m: m.scale.mul_(4.0),
    "array": lambda m: setattr(m, "table", np.full(1, 4, dtype=np.float32)),
    "array in place": lambda m: m.table.fill(4),
    "list in a dict": lambda m: m.factors["default"].__setitem__(0, 4.0),
    "dict": lambda m: setattr(m, "factors", {"default": [4.0]}),
    "object": lambda m: setattr(m, "control", Control(4.0)),
    "attribute of an object": lambda m: setattr(m.control, "strength", 4.0),
    "object in an object": lambda m: setattr(m.control.nested["deep"], "strength", 4.0),
    "object in a tuple": lambda m: setattr(m.pair[0], "strength", 4.0),
    "module": lambda m: setattr(m, "base", nn.Sequential(m.base, m.base)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_of_what_a_layer_holds_is_followed(model: PreTrainedModel, kind: str) -> None:
    layer = decoder_layers(model)[1]
    mixed = layer.mlp = Mixed(layer.mlp)  # type: ignore[assignment]
    assert_follows(model, lambda: CHANGES[kind](mixed))


def test_an_object_exchanged_for_an_equal_one_is_watched(model: PreTrainedModel) -> None:
    layer = decoder_layers(model)[1]
    mixed = layer.mlp = Mixed(layer.mlp)  # type: ignore[assignment]
    spec = wrap(model, PLAN)
    before, _ = both(spec, model)
    mixed.control = Control()
    assert torch.equal(both(spec, model)[0], before)
    mixed.control.strength = 4.0
    ours, theirs = both(spec, model)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, before)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("gemma2", "final_logit_softcapping", 0.02),
        ("mistral", "sliding_window", 3),
        ("granite", "logits_scaling", -2.0),
    ],
)
def test_a_change_of_the_config_is_followed(family: str, name: str, value: Any) -> None:
    model = tiny_model(family)
    state = ModelState(model)
    setattr(model.config, name, value)
    assert not state.is_current()
    spec = wrap(model, PLAN)
    ours, theirs = both(spec, model, 13)
    assert torch.equal(ours, theirs)


def test_a_window_that_the_layers_were_not_built_with_is_refused() -> None:
    model = tiny_model("gemma2")
    spec = wrap(model, PLAN)
    model.config.sliding_window = 300  # beyond what a probe can see
    for layer in decoder_layers(model):
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = 200
    with pytest.raises(UnsupportedModelError, match=r"config\.sliding_window is 300, .* built with \[200\]"):
        both(spec, model)


def test_an_attention_function_registered_anew_is_noticed(model: PreTrainedModel) -> None:
    sdpa = AttentionInterface._global_mapping["sdpa"]
    spec = wrap(model, PLAN)
    try:
        AttentionInterface.register("sdpa", lambda *args, **kwargs: (sdpa(*args, **kwargs)[0] * 2.0, None))
        with pytest.raises(UnsupportedModelError, match="cannot be reproduced"):
            both(spec, model)
    finally:
        AttentionInterface.register("sdpa", sdpa)


# --- Quantised activations ---


class QuantisesByPass(nn.Module):
    """A linear layer that rounds activations in steps of the largest activation of the pass."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().max() / 127
        return self.linear((x / step).round() * step)  # type: ignore[no-any-return]


def test_a_quantiser_whose_rounding_depends_on_the_pass_is_refused(model: PreTrainedModel) -> None:
    spec = wrap(model, PLAN)
    mlp = decoder_layers(model)[1].mlp
    mlp.down_proj = QuantisesByPass(mlp.down_proj)  # type: ignore[union-attr]
    for attempt in (lambda: both(spec, model), lambda: wrap(model, PLAN)):
        with pytest.raises(UnsupportedModelError, match="depend on the length of the pass"):
            attempt()


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao", "torchao of today"])
def test_known_quantisers_of_activations_are_refused_by_name(model: PreTrainedModel, library: str) -> None:
    class Linear8bitLt(nn.Linear):
        pass

    class LinearActivationQuantizedTensor(nn.Parameter):
        pass

    linear = model.get_submodule("model.layers.2.mlp.up_proj")
    if library == "bitsandbytes":
        linear.__class__ = Linear8bitLt
    elif library == "torchao":
        linear.weight.__class__ = LinearActivationQuantizedTensor
    else:
        linear.weight.act_quant_kwargs = object()
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.2\.mlp\.up_proj \(Linear.*quantises activations"):
        wrap(model, PLAN)


# --- What is no change ---


def test_what_does_not_decide_the_logits_rebuilds_nothing(model: PreTrainedModel) -> None:
    spec = wrap(model, PLAN)
    target = spec.runtime.views["target"]
    both(spec, model)
    model.train()
    model.eval()
    model.model.layers[1].train()
    model.generation_config.top_k = 7
    model.config.use_cache = True
    model.generate = spec.generate  # type: ignore[assignment, operator]
    del model.generate
    for _ in range(2):
        both(spec, model)
    assert spec.runtime.views["target"] is target
    model.model.layers[1].eval()
    assert ModelState(model)._is_equal(), "the quick comparison suffices where nothing changed"


def test_a_model_may_hold_its_own_speculator(model: PreTrainedModel) -> None:
    spec = model.spec = wrap(model, PLAN)
    both(spec, model)
    target = spec.runtime.views["target"]
    ours, theirs = both(spec, model)
    assert torch.equal(ours, theirs)
    assert spec.runtime.views["target"] is target
    assert target.spec is spec
