"""Speculators with captured rounds, plans and requests for them, and fixtures that watch torch's compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from models import FIRST_DROPPED, prompts
from tape import NoReads, TapeRecorder, tensors_of
from torch import Tensor
from transformers import PreTrainedModel

import selfspec.decoding.round
from selfspec import DecodeOptions, DraftSpec, Plan, SelfSpeculator, SkipSet
from selfspec.plan.lookup import PromptLookup
from selfspec.runtime.cuda_graphs import Graphs
from selfspec.runtime.runtime import Runtime

GAMMA = 3
PLAN = Plan(skip_set=FIRST_DROPPED, gamma=GAMMA)
LOOKUP = PromptLookup(gamma=4, min_ngram=1, max_ngram=3)
CASCADE = Plan(skip_set=FIRST_DROPPED, gamma=GAMMA, prompt_lookup=LOOKUP)
NEW_TOKENS = 23
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
SAMPLING = {"do_sample": True, "max_new_tokens": NEW_TOKENS}
WARPERS = {"temperature": 0.8, "top_k": 41, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3}


def batch(*lengths: int, seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Random prompts of these lengths, as arguments of `generate`."""
    tokens, mask = prompts(*lengths, seed=seed)
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}


def graphs_of(spec: SelfSpeculator) -> Graphs:
    assert spec.runtime.graphs is not None
    return spec.runtime.graphs


def taped(model: PreTrainedModel, plan: Plan = PLAN, **options: Any) -> SelfSpeculator:
    """A speculator that records rounds on a tape and replays them."""
    return SelfSpeculator(model, plan, DecodeOptions(**options), recorder=TapeRecorder())


def tape_of(spec: SelfSpeculator) -> TapeRecorder:
    recorder = graphs_of(spec).recorder
    assert isinstance(recorder, TapeRecorder)
    return recorder


def fixed_widths(model: PreTrainedModel, plan: Plan) -> SelfSpeculator:
    """A speculator that runs the work of captured rounds without capturing."""
    spec = taped(model, plan)
    graphs_of(spec).run = lambda key, work: work()  # type: ignore[method-assign]
    return spec


def compiled_whole(model: PreTrainedModel, plan: Plan, backend: str) -> SelfSpeculator:
    """A speculator that compiles the captured work as whole graphs: reading the device would break a graph."""
    spec = fixed_widths(model, plan)
    runtime = spec.runtime
    # Every round already runs in inference mode. Entering inference mode again would be compiled, too.
    runtime.run = MethodType(Runtime.run.__wrapped__, runtime)  # type: ignore[attr-defined, method-assign]
    compiled: dict[Any, Any] = {}
    first: dict[Any, Any] = {}

    def run(key: Any, work: Any) -> Any:
        if key not in compiled:
            compiled[key] = torch.compile(work, fullgraph=True, dynamic=False, backend=backend)
        result = compiled[key]()
        # Copy results to the addresses of the first results, as a graph does: a verify pass reads the draft there.
        kept = first.setdefault(key, result)
        for old, new in zip(tensors_of(kept), tensors_of(result), strict=True):
            old.copy_(new)
        return kept

    graphs_of(spec).run = run  # type: ignore[method-assign]
    return spec


def assert_captured(spec: SelfSpeculator) -> None:
    assert spec.stats.captured
    assert not spec.stats.slower_paths
    assert len(graphs_of(spec)) >= 2


def assert_replays(spec: SelfSpeculator, uncaptured: SelfSpeculator, given: dict[str, Tensor]) -> None:
    """Captured rounds write the model's own tokens and equal the rounds of `uncaptured`.

    A wrong draft changes the rounds only: the output stays the model's own.
    """
    expected = spec.model.generate(**given, **GREEDY)
    uncaptured.generate(**given, **GREEDY)
    for _ in range(2):  # the second request replays all its rounds
        assert torch.equal(spec.generate(**given, **GREEDY), expected)
        assert spec.stats.history == uncaptured.stats.history
    assert_captured(spec)
    assert tape_of(spec).recorded == 2
    assert tape_of(spec).played > spec.stats.passes


def assert_same_draws(one: SelfSpeculator, other: SelfSpeculator, given: dict[str, Tensor], **options: Any) -> None:
    """With the same seed both draw the same tokens; another seed draws other tokens."""
    written = []
    for spec in (one, other):
        for seed in (3, 5):
            torch.manual_seed(seed)
            written.append(spec.generate(**given, **options))
    assert torch.equal(written[0], written[2])
    assert torch.equal(written[1], written[3])
    assert not torch.equal(written[0], written[1])
    assert 0 < other.stats.accepted < other.stats.drafted


def kinds_of_layers(model: PreTrainedModel, draft_spec: DraftSpec | SkipSet | None = None) -> int:
    """The number of compiled layers of a view: layers of one kind differ only in their weights."""
    layers, spec = range(model.config.num_hidden_layers), DraftSpec.of(draft_spec)
    windows = getattr(model.config, "layer_types", None) or [None] * len(layers)
    kinds = {(windows[i], spec.choice("attn", i), spec.choice("mlp", i)) for i in layers}
    return len({(attn != "skip" and window, attn, mlp) for window, attn, mlp in kinds if {attn, mlp} != {"skip"}})


def addresses(spec: SelfSpeculator) -> list[int]:
    """The addresses of the cache, the row buffers and the results of captured work."""
    runtime = spec.runtime
    tensors = [tensor for index in runtime.views.layer_shapes for tensor in runtime.cache.layer(index)]
    tensors += [runtime.cache.lengths, *tensors_of(runtime.row_buffers)]
    results = [result for _, result in graphs_of(spec)._captured.values()]
    return [tensor.data_ptr() for tensor in tensors + [t for result in results for t in tensors_of(result)]]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the methods with which Python reads a tensor, one entry per read."""
    seen: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu"):
        method = getattr(Tensor, name)

        def reading(self: Tensor, *args: Any, _name: str = name, _method: Any = method, **kwargs: Any) -> Any:
            seen.append(_name)
            return _method(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, reading)
    return seen


@pytest.fixture
def reads_by_round(reads: list[str], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The reads of each round. Other copies to the host are errors."""
    rounds: list[list[str]] = []
    step = selfspec.decoding.round.step

    def counted(*args: Any) -> Any:
        before = len(reads)
        with NoReads():
            committed = step(*args)
        rounds.append(reads[before:])
        return committed

    monkeypatch.setattr(selfspec.decoding.round, "step", counted)
    return rounds


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Reset torch's compiler before and after the test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> list[int]:
    """Compile layers one by one, as on CUDA, and record the nodes of each compilation.

    The backend `aot_eager` generates no code, but functionalises mutations as the default backend does.
    """
    count: list[int] = []
    compile_ = torch.compile

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        count.append(len(graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counting, **options))
    monkeypatch.setattr("selfspec.runtime.passes.fuses_layers", lambda device: True)
    return count
