"""The CUDA path on a GPU. Tests with a CPU substitute, such as a tape for graphs, also run on a CPU.

The CUDA-only code that these tests run: `CudaRecorder` with `_recover`, `graphs_for`, pinned reads, events in
`DeviceTimer`, static passes, packing and kernels of 4-bit weights, layers compiled by Triton, flash kernels,
`prefill.chunk_length`,
device names, `wait_for`, `Memory.default`, other streams, and other devices than the default.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import pytest
import quantised_models
import torch
from captured import (
    CASCADE,
    GAMMA,
    GREEDY,
    NEW_TOKENS,
    PLAN,
    SAMPLING,
    WARPERS,
    addresses,
    assert_captured,
    batch,
    graphs_of,
)
from models import FIRST_DROPPED, damp, damped_model, prompts
from quantised_models import drafting, few_prompts
from selfspec_search.confirm.contender import Contender
from selfspec_search.replay.memory import Memory
from selfspec_search.replay.sampling_settings import Sampling
from selfspec_search.replay.texts import Text
from tape import NoReads, TapeRecorder
from torch import Tensor
from transformers import PreTrainedModel

import selfspec.decoding.round
from selfspec import DecodeOptions, Plan, SelfSpeculator, SkipSet, draft_bytes, wrap
from selfspec.benchmark.lossless import compare
from selfspec.decoding.round import read
from selfspec.decoding.stats import DeviceTimer
from selfspec.drafters.build import drafter_of
from selfspec.huggingface.loading import AUTO, _device, describe_device
from selfspec.models.quantised_linear import QuantisedWeight, device_unsupported_reason, quantise
from selfspec.plan.draft_spec import INT4, INT8, Format
from selfspec.plan.lookup import PromptLookup
from selfspec.runtime.attention.flash import TorchFlash
from selfspec.runtime.compiling import uncompiled_reason
from selfspec.runtime.cuda_graphs import CudaRecorder, Graphs, Recorder, Work
from selfspec.runtime.prefill import CPU_CHUNK, chunk_length
from selfspec.utils.devices import device_name
from selfspec.utils.statistics import timed_task

ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
ON_CPU = pytest.param("cpu", marks=pytest.mark.slow)
BOTH = pytest.mark.parametrize("device", [ON_CPU, ON_GPU], indirect=True)
QUICK = pytest.mark.parametrize("device", ["cpu", ON_GPU], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return the_device(request.param)


@pytest.fixture
def cuda() -> torch.device:
    return the_device("cuda")


def the_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def model_on(device: torch.device, family: str = "llama", **options: Any) -> PreTrainedModel:
    return damped_model(family, FIRST_DROPPED, **options).to(device)


def captured(
    model: PreTrainedModel, plan: Plan = PLAN, draft_model: PreTrainedModel | None = None, **options: Any
) -> SelfSpeculator:
    """A speculator whose rounds are captured, on a CPU by a tape."""
    recorder = TapeRecorder() if model.device.type == "cpu" else None
    return SelfSpeculator(model, plan, DecodeOptions(**{"compile": False} | options), draft_model, recorder=recorder)


# --- The same tokens ---


FAMILIES = [
    ("cpu", "llama"),
    *(pytest.param("cuda", f, marks=pytest.mark.gpu) for f in ("llama", "gemma3_text", "qwen2")),
]


@pytest.mark.parametrize(("device", "family"), FAMILIES, indirect=["device"])
def test_captured_rounds_are_lossless(device: torch.device, family: str) -> None:
    model = model_on(device, family)
    spec, given = captured(model), batch(11, 5, 7, device=device)
    expected = model.generate(**given, **GREEDY)
    for _ in range(3):  # the last request replays all its rounds
        assert torch.equal(spec.generate(**given, **GREEDY), expected)
    assert_captured(spec)
    assert 0.2 < spec.stats.acceptance_rate < 0.9
    assert spec.stats.backend == "sdpa"
    if device.type == "cuda":
        assert isinstance(graphs_of(spec).recorder, CudaRecorder)
        assert spec.stats.graph_bytes > 0


LOOKUP = Plan.none(prompt_lookup=PromptLookup(gamma=4, min_ngram=1, max_ngram=3))


@QUICK
@pytest.mark.parametrize("plan", [CASCADE, LOOKUP, Plan.none()], ids=["cascade", "lookup", "plain"])
def test_every_drafter_is_captured(plan: Plan, device: torch.device) -> None:
    model = model_on(device)
    spec, given = captured(model, plan), batch(22, 5, 14, device=device)
    given["input_ids"][:, -3:] = given["input_ids"][:, :3]  # something to look up in the first row
    for _ in range(3):
        assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    assert_captured(spec)


@BOTH
@pytest.mark.parametrize("lookup", [None, LOOKUP.prompt_lookup], ids=["alone", "after lookup"])
def test_a_draft_model_is_captured(lookup: PromptLookup | None, device: torch.device) -> None:
    model, plan = model_on(device), Plan(skip_set=SkipSet(), gamma=GAMMA, prompt_lookup=lookup)
    draft_model = copy.deepcopy(model)
    damp(draft_model, FIRST_DROPPED, 0.0)
    spec, given = captured(model, plan, draft_model=draft_model), batch(22, 5, 14, device=device)
    given["input_ids"][:, -3:] = given["input_ids"][:, :3]
    uncaptured = wrap(model, plan, compile=False, graphs=False, draft_model=draft_model)
    for _ in range(3):
        assert torch.equal(spec.generate(**given, **GREEDY), uncaptured.generate(**given, **GREEDY))
        assert spec.stats.history == uncaptured.stats.history
    assert_captured(spec)
    assert 0.2 < spec.stats.acceptance_rate < 0.9 or lookup
    itself = captured(model, plan, draft_model=model)
    for _ in range(3):
        assert torch.equal(itself.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    drafted, accepted = itself.stats.by_origin["draft model"]
    assert drafted == accepted > GAMMA


QUANTISED = [INT4, INT8]


@BOTH
@pytest.mark.parametrize("format", QUANTISED, ids=str)
def test_the_kernels_of_quantised_weights_multiply_by_the_dequantised_weight(
    format: Format, device: torch.device
) -> None:
    if (unsupported_reason := device_unsupported_reason(format, device)) is not None:
        pytest.skip(unsupported_reason)
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(n, 256, generator=generator).to(device) for n in (176, 7))
    product = quantise(weight, None, format)(inputs)
    expected = inputs @ QuantisedWeight.of(weight, format).dequantised().T
    assert (product - expected).norm() < 0.01 * expected.norm()
    assert torch.equal(quantise(weight, None, format)(inputs), product)


@BOTH
@pytest.mark.parametrize("format", QUANTISED, ids=str)
def test_quantised_drafts_are_captured(format: Format, device: torch.device) -> None:
    if (unsupported_reason := device_unsupported_reason(format, device)) is not None:
        pytest.skip(unsupported_reason)
    model, plan = quantised_models.damped_model("llama").to(device), drafting(format, trimmed=True)
    spec, given = captured(model, plan), {name: t.to(device) for name, t in few_prompts(11, 5, 7).items()}
    expected = model.generate(**given, **GREEDY)
    for _ in range(3):
        assert torch.equal(spec.generate(**given, **GREEDY), expected)
    assert_captured(spec)
    assert spec.stats.accepted > 0
    assert spec.stats.draft_bytes == draft_bytes(model, plan) > 0


@QUICK
def test_one_graph_serves_requests_with_other_lengths_limits_and_stop_tokens(device: torch.device) -> None:
    model = model_on(device)
    spec = captured(model)
    kept: list[int] = []
    for lengths, limit, stop in (
        ((11, 5), 41, 7),
        ((3, 17), 41, 3),
        ((2, 2), 1, 5),
        ((13, 1), 2, None),
        ((4, 9), 29, 11),
    ):
        options = {"do_sample": False, "max_new_tokens": limit, "eos_token_id": stop, "pad_token_id": 0}
        given = batch(*lengths, device=device)
        assert torch.equal(spec.generate(**given, **options), model.generate(**given, **options))
        assert_captured(spec)
        kept = kept or addresses(spec)
        assert addresses(spec) == kept
    assert len(graphs_of(spec)) == 2


@QUICK
@pytest.mark.slow
def test_a_cache_that_grows_drops_its_graphs(device: torch.device) -> None:
    model = model_on(device)
    spec = captured(model)
    for lengths, limit in (((11,), 37), ((11,), 131), ((11, 5), 23)):
        given, options = batch(*lengths, device=device), GREEDY | {"max_new_tokens": limit}
        for _ in range(2):
            assert torch.equal(spec.generate(**given, **options), model.generate(**given, **options))
        assert_captured(spec)
        assert len(graphs_of(spec)) == 2


@BOTH
def test_graphs_are_captured_again_while_results_of_dropped_graphs_are_held(device: torch.device) -> None:
    """A notebook holds results in the frames of an error: the results keep their memory, but not the pool's handle."""
    graphs = Graphs(CudaRecorder(device) if device.type == "cuda" else TapeRecorder())
    number = torch.zeros(1, device=device)

    def plus_one() -> Result:
        return Result(number + 1)

    held = []
    for _ in range(3):
        for _ in range(3):
            held.append(graphs.run("plus one", plus_one).tensor)
            assert held[-1].item() == number.item() + 1
            number += 1
        assert len(graphs) == 1, graphs.uncaptured_reason
        graphs.drop()


class Result:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


# --- Draws ---


@BOTH
def test_the_same_seed_draws_the_same_tokens_and_another_seed_draws_others(device: torch.device) -> None:
    spec, given = captured(model_on(device)), batch(11, 5, 7, device=device)
    written = []
    for seed in (0, 3, 3, 5):  # rounds are captured during the first request
        torch.manual_seed(seed)
        written.append(spec.generate(**given, **SAMPLING | WARPERS))
    assert_captured(spec)
    assert torch.equal(written[1], written[2])
    assert not torch.equal(written[2], written[3])


@BOTH
def test_sampling_with_top_k_of_one_is_greedy(device: torch.device) -> None:
    model = model_on(device)
    spec, given = captured(model), batch(11, 5, 7, device=device)
    expected = model.generate(**given, **GREEDY)
    for _ in range(3):
        assert torch.equal(spec.generate(**given, **SAMPLING | {"top_k": 1}), expected)
    assert_captured(spec)


@BOTH
def test_captured_rounds_sample_the_models_distribution(device: torch.device) -> None:
    """Chi-square test of the second new token of many rows against the exact distribution."""
    rows, model = 64, model_on(device)
    prompt = batch(11, device=device)["input_ids"]
    spec, draws = captured(model), 16 * rows
    options = {"do_sample": True, "max_new_tokens": 2, "top_k": 5}  # a round drafts one token
    with torch.inference_mode():
        first = top5(model(prompt).logits[0, -1])
        exact = torch.zeros_like(first)
        for token in first.nonzero()[:, 0]:
            exact += first[token] * top5(model(torch.cat([prompt[0], token[None]])[None]).logits[0, -1])
    counts = torch.zeros_like(exact)
    for _ in range(draws // rows):
        second = spec.generate(prompt.expand(rows, -1), **options)[:, -1]
        counts += torch.bincount(second, minlength=len(counts))
    assert_captured(spec)
    assert 0 < spec.stats.accepted < spec.stats.drafted
    assert counts[exact == 0].sum() == 0
    expected, often = draws * exact, draws * exact >= 5
    expected, counts = (torch.cat([x[often], x[~often].sum()[None]]) for x in (expected, counts))
    deviation = ((counts - expected).square() / expected.clamp(min=1)).sum()
    freedom = len(expected) - 1
    # False alarm: fewer than one in a thousand seeds.
    assert deviation < freedom + 5 * (2 * freedom) ** 0.5


def top5(logits: Tensor) -> Tensor:
    kept = torch.full_like(logits, float("-inf"))
    values, indices = logits.topk(5)
    return kept.scatter_(0, indices, values).softmax(0)


# --- Reads of the device ---


class Watched:
    """A recorder that refuses work that reads the device."""

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        self.recorder, self.device = recorder, device

    def warm_up(self, work: Work) -> Any:
        return self.recorder.warm_up(lambda: self._unread(work))

    def record(self, work: Work) -> tuple[Callable[[], None], Any]:
        return self.recorder.record(lambda: self._unread(work))

    def nbytes(self) -> int:
        return self.recorder.nbytes()

    def _unread(self, work: Work) -> Any:
        with no_reads(self.device):
            return work()


@contextmanager
def no_reads(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        with NoReads():
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@BOTH
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("options", [GREEDY, SAMPLING | WARPERS], ids=["greedy", "sampling"])
@pytest.mark.parametrize("plan", [PLAN, CASCADE], ids=["layers", "cascade"])
def test_captured_work_never_reads_the_device(plan: Plan, options: dict[str, Any], device: torch.device) -> None:
    recorder = CudaRecorder(device) if device.type == "cuda" else TapeRecorder()
    options_of_all = DecodeOptions(compile=False)
    spec = SelfSpeculator(model_on(device), plan, options_of_all, recorder=Watched(recorder, device))
    for _ in range(3):
        spec.generate(**batch(11, 5, 7, device=device), **options)
    assert_captured(spec)


@BOTH
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_read_of_the_device_is_an_error(device: torch.device) -> None:
    number = torch.ones(3, device=device)
    with pytest.raises(RuntimeError), no_reads(device):
        number.sum().item()


@BOTH
def test_read_returns_the_values(device: torch.device) -> None:
    host_values = torch.arange(35, device=device).view(5, 7)
    assert read(host_values) == host_values.tolist()
    assert read(host_values.T) == host_values.T.tolist()


@BOTH
def test_a_failed_capture_restores_stream_and_generators(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_on(device)
    spec, given = captured(model), batch(11, 5, 7, device=device)
    expected = model.generate(**given, **GREEDY)
    recorder, process, recording = graphs_of(spec).recorder, selfspec.decoding.round.process, []
    record = recorder.record

    def recorded(work: Work) -> Any:
        recording.append(True)
        try:
            return record(work)
        finally:
            recording.clear()

    def reading(*args: Any) -> Tensor:
        scores = process(*args)
        if recording:
            scores.sum().item()
        return scores

    monkeypatch.setattr(recorder, "record", recorded)
    monkeypatch.setattr(selfspec.decoding.round, "process", reading)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    assert torch.equal(spec.generate(**given, **GREEDY), expected)
    assert not spec.stats.captured
    (reason,) = spec.stats.slower_paths
    assert reason.startswith("rounds are not captured: ")
    if stream is not None:
        assert "capturing" in reason, "the reason must name the cause"
        assert torch.cuda.current_stream(device) == stream
    for options in (GREEDY, SAMPLING | {"top_k": 1}):  # random generators work, too
        assert torch.equal(spec.generate(**given, **options), expected)
    fresh = captured(model)  # captures work, too
    for options in (GREEDY, SAMPLING | {"top_k": 1}) * 2:
        assert torch.equal(fresh.generate(**given, **options), expected)
    assert_captured(fresh)


@BOTH
def test_rounds_are_captured_after_an_interrupt(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_on(device)
    spec, given = captured(model), batch(11, 5, 7, device=device)
    recorder = graphs_of(spec).recorder
    record = recorder.record

    def interrupted(work: Work) -> Any:
        def interrupt() -> None:
            work()
            raise KeyboardInterrupt

        monkeypatch.setattr(recorder, "record", record)
        return record(interrupt)

    monkeypatch.setattr(recorder, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        spec.generate(**given, **GREEDY)
    for _ in range(2):
        assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    assert_captured(spec)


# --- Time ---


@BOTH
def test_device_times_are_positive_and_no_longer_than_the_whole(device: torch.device) -> None:
    matrix = torch.ones(257, 257, device=device)
    start, timer = perf_counter(), DeviceTimer(device)
    for _ in range(4):
        timer.mark()
        matrix = matrix @ matrix
    read(matrix[:1, :1].long())
    total = perf_counter() - start
    assert len(timer.seconds()) == 3
    assert all(seconds > 0 for seconds in timer.seconds())
    assert sum(timer.seconds()) < total


@BOTH
def test_draft_verify_and_prefill_take_less_than_the_total_time(device: torch.device) -> None:
    spec = captured(model_on(device))
    for _ in range(2):
        spec.generate(**batch(11, device=device), **GREEDY)
    seconds = spec.stats.seconds
    assert seconds["draft"] > 0
    assert seconds["verify"] > 0
    assert seconds["prefill"] > 0
    assert seconds["draft"] + seconds["verify"] + seconds["prefill"] < seconds["total"]


# --- Flash kernels and compiled layers ---


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "sdpa"), pytest.param("cuda", "torch-flash", marks=pytest.mark.gpu)],
    indirect=["device"],
)
def test_bfloat16_differs_from_plain_decoding_by_near_ties_alone(device: torch.device, backend: str) -> None:
    """Compares with captured plain decoding, one row at a time, so that only near-ties may differ."""
    model = model_on(device, head_dim=32, dtype=torch.bfloat16)
    spec, plain = captured(model, backend=backend), captured(model, Plan.none(), backend=backend)
    compared = []
    for length in (11, 5, 7):
        given = batch(length, device=device)
        got, expected = (one.generate(**given, **GREEDY)[0, length:] for one in (spec, plain))
        compared.append((given["input_ids"][0], expected, got))
    assert_captured(spec)
    assert spec.stats.backend == backend
    verdict = compare(spec.runtime, compared, gamma=GAMMA)
    assert verdict.errors == 0, [str(difference) for difference in verdict.differences]
    assert verdict.tokens == 3 * NEW_TOKENS


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's warnings
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("gemma3_text", torch.float32), ("llama", torch.bfloat16)]
)
def test_layers_are_compiled_by_default(family: str, dtype: torch.dtype, cuda: torch.device) -> None:
    assert uncompiled_reason(cuda) is None
    model = model_on(cuda, family, dtype=dtype, head_dim=32)
    spec, given = wrap(model, PLAN), batch(11, 5, 7, device=cuda)
    for _ in range(3):
        got = spec.generate(**given, **GREEDY)
    assert_captured(spec)
    assert spec.stats.compiled
    if dtype == torch.float32:
        assert torch.equal(got, model.generate(**given, **GREEDY))
    else:
        assert isinstance(spec.runtime.backend.backend, TorchFlash) or spec.stats.backend == "flash-attn"
    assert spec.runtime.passes.uncompiled_reason is None


# --- Code that depends on the device ---


@pytest.mark.gpu
def test_long_prompts_are_prefilled_in_chunks(cuda: torch.device) -> None:
    model, rows, longest = model_on(cuda), 64, CPU_CHUNK // 4 + 13
    spec, given = captured(model), batch(*range(longest - rows + 1, longest + 1), device=cuda)
    options = GREEDY | {"max_new_tokens": 7}
    assert torch.equal(spec.generate(**given, **options), model.generate(**given, **options))
    assert chunk_length(spec.runtime) == CPU_CHUNK // 4


@BOTH
def test_devices_are_named(device: torch.device) -> None:
    assert device_name(device)
    assert describe_device(device)
    if device.type == "cuda":
        assert _device(AUTO).type == "cuda"
        assert device_name(device) in describe_device(device)


@BOTH
def test_the_search_times_a_device(device: torch.device) -> None:
    matrix = torch.ones(257, 257, device=device)
    assert timed_task(lambda: matrix @ matrix, device)() > 0
    assert Memory.default(device) > 2**20
    spec = captured(model_on(device))
    contender = Contender(spec.runtime, drafter_of(PLAN, spec.runtime), Sampling())
    text = Text(tokens=prompts(11 + 13)[0][0].to(device), prompt=11, allowed=13)
    contender.decode(0, [text])
    assert contender.runs[0][0].seconds > 0


@pytest.mark.gpu
def test_requests_run_in_any_stream(cuda: torch.device) -> None:
    model = model_on(cuda)
    spec, given = captured(model), batch(11, 5, 7, device=cuda)
    expected = model.generate(**given, **GREEDY)
    torch.cuda.synchronize(cuda)
    for stream in (torch.cuda.Stream(cuda), torch.cuda.default_stream(cuda), torch.cuda.Stream(cuda)):
        with torch.cuda.stream(stream):
            assert torch.equal(spec.generate(**given, **GREEDY), expected)
        stream.synchronize()
    assert_captured(spec)


@pytest.mark.gpu
def test_the_model_may_be_on_another_device(cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    other = torch.device("cuda", 1)
    model = model_on(other)
    spec, given = captured(model), batch(11, 5, 7, device=other)
    assert torch.cuda.current_device() == 0
    for _ in range(3):
        assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
    assert_captured(spec)
    assert spec.stats.seconds["draft"] > 0
