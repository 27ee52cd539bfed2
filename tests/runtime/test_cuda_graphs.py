"""Captured rounds are lossless, read the device once per round, and keep the addresses of their tensors.

On a CPU a tape replaces CUDA graphs (see `tape.py`). `test_cuda.py` runs similar tests with CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captured import (
    CASCADE,
    GAMMA,
    GREEDY,
    LOOKUP,
    NEW_TOKENS,
    PLAN,
    SAMPLING,
    WARPERS,
    addresses,
    assert_captured,
    assert_replays,
    assert_same_draws,
    batch,
    compiled_whole,
    fixed_widths,
    graphs_of,
    tape_of,
    taped,
)
from models import FIRST_DROPPED, PAD, VOCABULARY, damp, damped_model, tiny_model
from tape import HostReadError, NoReads, TapeRecorder
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)

import selfspec.decoding.round
from selfspec import Plan, SelfSpeculator, SkipSet, wrap
from selfspec.models.support import SUPPORTED_MODEL_TYPES
from selfspec.plan.lookup import PromptLookup
from selfspec.runtime.cuda_graphs import MAX_GRAPHS, Graphs

# --- Lossless ---


FEW = ("gemma3_text", "llama", "qwen3_moe")
OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in sorted(SUPPORTED_MODEL_TYPES.difference(FEW))]


@pytest.mark.parametrize("family", [*FEW, *OTHERS])
def test_replayed_rounds_are_lossless_and_equal_uncaptured_rounds(family: str) -> None:
    model = damped_model(family, FIRST_DROPPED)
    spec = taped(model)
    assert_replays(spec, wrap(model, PLAN), batch(11, 5, 7))
    assert 0.2 < spec.stats.acceptance_rate < 0.9


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (11, 11)], ids=str)
@pytest.mark.parametrize("pad", [-1, VOCABULARY])
@pytest.mark.parametrize("drafts", ["cascade", "draft model"])
def test_the_pad_token_may_be_outside_the_vocabulary(
    drafts: str, pad: int, lengths: tuple[int, ...], captured: bool, llama: PreTrainedModel
) -> None:
    short = {"prompt_lookup": LOOKUP.model_copy(update={"gamma": 1})}
    plan = CASCADE.model_copy(update=short) if drafts != "draft model" else Plan(skip_set=SkipSet(), gamma=GAMMA)
    draft_model, recorder = llama if drafts == "draft model" else None, TapeRecorder() if captured else None
    spec = SelfSpeculator(llama, plan, draft_model=draft_model, recorder=recorder)
    given, options = batch(*lengths), GREEDY | {"pad_token_id": pad}
    given["input_ids"][0] = given["input_ids"][0, 0]  # something to look up in the first row alone
    assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))


@pytest.mark.parametrize("options", [{}, WARPERS, {"repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("plan", [PLAN, pytest.param(CASCADE, marks=pytest.mark.slow)], ids=["layers", "cascade"])
def test_with_the_same_seed_replayed_and_uncaptured_rounds_draw_the_same_tokens(
    options: dict[str, Any], plan: Plan, llama: PreTrainedModel
) -> None:
    spec = taped(llama, plan)
    assert_same_draws(fixed_widths(llama, plan), spec, batch(11, 5, 7), **SAMPLING | options)
    assert_captured(spec)


def test_captured_greedy_rounds_apply_a_repetition_penalty(llama: PreTrainedModel) -> None:
    options = GREEDY | {"repetition_penalty": 1.3}
    spec, given = taped(llama), batch(11, 5, 7)
    for _ in range(2):
        assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
    assert_captured(spec)


def test_rows_end_at_their_own_stop_tokens(llama: PreTrainedModel) -> None:
    given = batch(11, 5, 7)
    free = llama.generate(**given, **GREEDY)
    stops = {"eos_token_id": [int(free[0, 11 + 13]), int(free[1, 11 + 5])], "pad_token_id": PAD}
    expected = llama.generate(**given, **GREEDY | stops)
    spec = taped(llama)
    for _ in range(2):
        assert torch.equal(spec.generate(**given, **GREEDY | stops), expected)
    assert spec.stats.captured


def test_each_repetition_penalty_has_its_own_graph(llama: PreTrainedModel) -> None:
    spec, given = taped(llama), batch(11)
    for penalty in (1.0, 1.5, 1.0, 1.5):
        options = GREEDY | {"repetition_penalty": penalty}
        assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
    assert tape_of(spec).recorded == 4


def processed(processor: LogitsProcessor) -> dict[str, Any]:
    return {"logits_processor": LogitsProcessorList([processor])}


MANY_STOPS = {"eos_token_id": list(range(17)), "pad_token_id": PAD}
TENSOR_WARPER = processed(MinPLogitsWarper(torch.tensor(0.3)))
IGNORES = "RepetitionPenaltyLogitsProcessor that ignores other tokens than padding is not captured"
UNCAPTURED = [
    ({}, MANY_STOPS, "there are 17 stop tokens, and captured rounds have room for 16"),
    ({"exit_threshold": 0.4}, {}, "with an exit threshold, the host reads the device after every drafted token"),
    ({}, {"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor is not captured"),
    ({}, TENSOR_WARPER, "MinPLogitsWarper with a tensor among its settings is not captured"),
    *(
        ({}, processed(RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=torch.full((2,), n))), IGNORES)
        for penalty in (0.1, 3.0)
        for n in (4, 11)
    ),
]


@pytest.mark.parametrize(("changes", "options", "reason"), UNCAPTURED)
def test_requests_that_cannot_be_captured_are_lossless_and_stats_say_why(
    changes: dict[str, Any], options: dict[str, Any], reason: str, llama: PreTrainedModel
) -> None:
    spec, given = taped(llama, PLAN.model_copy(update=changes)), batch(11, 5)
    assert torch.equal(spec.generate(**given, **GREEDY | options), llama.generate(**given, **GREEDY | options))
    assert spec.stats.slower_paths == [f"rounds are not captured: {reason}"]
    assert tape_of(spec).recorded == 0


def test_a_streamer_reads_the_device_once_for_the_prompt(llama: PreTrainedModel, reads: list[str]) -> None:
    spec, given, put = taped(llama), batch(11, 5), []

    class Streamer:
        def put(self, tokens: Tensor) -> None:
            put.append(tokens)

        def end(self) -> None:
            pass

    spec.generate(**given, **GREEDY)
    reads.clear()
    spec.generate(**given, **GREEDY)
    alone = len(reads)
    reads.clear()
    spec.generate(**given, **GREEDY, streamer=Streamer())
    assert len(reads) == alone + 1
    assert len(put) == 1 + NEW_TOKENS


def test_captured_rounds_return_scores_and_logits(llama: PreTrainedModel) -> None:
    spec, given = taped(llama), batch(11, 5)
    options = GREEDY | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = llama.generate(**given, **options)
    for _ in range(2):
        output = spec.generate(**given, **options)
    for ours, theirs in ((output.scores, expected.scores), (output.logits, expected.logits)):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-4)


# --- What is not captured ---


def test_a_failed_capture_is_lossless_and_stats_say_why(llama: PreTrainedModel) -> None:
    class Failing(TapeRecorder):
        def record(self, work: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing\nand a page of advice")

    spec, given = SelfSpeculator(llama, PLAN, recorder=Failing()), batch(11, 5)
    assert torch.equal(spec.generate(**given, **GREEDY), llama.generate(**given, **GREEDY))
    assert spec.stats.slower_paths == ["rounds are not captured: operation not permitted when stream is capturing"]


def test_a_cpu_has_no_graphs_and_stats_say_so_if_graphs_are_requested(llama: PreTrainedModel) -> None:
    assert wrap(llama, PLAN).runtime.graphs is None
    spec = wrap(llama, PLAN, graphs=True)
    spec.generate(**batch(11), **GREEDY)
    assert spec.stats.slower_paths == ["rounds are not captured: CUDA graphs need a GPU, but the model is on cpu"]


# --- When graphs are dropped ---


def test_another_skip_set_drops_the_graphs(llama: PreTrainedModel) -> None:
    spec = taped(llama)
    spec.generate(**batch(11), **GREEDY)
    spec.runtime.draft_with(PLAN.skip_set)
    assert len(graphs_of(spec)) == 0


def test_the_number_of_graphs_is_limited() -> None:
    graphs, done = Graphs(TapeRecorder()), []
    for key in range(2 * MAX_GRAPHS + 1):
        for _ in range(2):
            graphs.run(key, lambda: Result(torch.ones(1)))
        done.append(len(graphs))
    assert max(done) == MAX_GRAPHS


def test_verify_never_reads_the_draft_of_a_dropped_graph(llama: PreTrainedModel) -> None:
    spec, given = taped(llama), batch(11, 5)
    expected = spec.generate(**given, **GREEDY)
    history = spec.stats.history
    graphs = graphs_of(spec)
    run, calls = graphs.run, iter(range(1000))

    def forgetful(key: Any, work: Any) -> Any:
        if next(calls) % 7 == 5:  # between draft and verify, as at the limit of graphs
            graphs.drop()
        return run(key, work)

    graphs.run = forgetful  # type: ignore[method-assign]
    for _ in range(3):
        assert torch.equal(spec.generate(**given, **GREEDY), expected)
        assert spec.stats.history == history, "an old draft would be accepted less often"


class Result:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


# --- One read per round ---


@pytest.mark.parametrize(
    "options", [pytest.param(GREEDY, marks=pytest.mark.slow), SAMPLING | WARPERS], ids=["greedy", "sampling"]
)
@pytest.mark.parametrize("plan", [PLAN, CASCADE, Plan.none()], ids=["layers", "cascade", "plain"])
def test_the_host_reads_once_per_round(
    plan: Plan, options: dict[str, Any], llama: PreTrainedModel, reads_by_round: list[list[str]]
) -> None:
    spec = taped(llama, plan)
    for _ in range(2):
        spec.generate(**batch(11, 5, 7), **options)
    assert len(reads_by_round) > NEW_TOKENS // (1 + plan.longest_draft)
    assert all(seen == ["tolist"] for seen in reads_by_round)


def test_a_time_limit_needs_no_further_read(
    llama: PreTrainedModel, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = taped(llama)
    read, counted = selfspec.decoding.round.read, []

    def counting(host_values: Tensor) -> Any:
        counted.append(host_values.device)
        return read(host_values)

    monkeypatch.setattr(selfspec.decoding.round, "read", counting)
    given, options = batch(11), GREEDY | {"max_time": 1000.0}
    assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
    assert len(counted) == spec.stats.passes


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), x.new_zeros(())),
        lambda x: x.to("meta"),
        lambda x: x.unique(),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_the_tape_refuses_what_a_graph_forbids(work: Any, inference: bool) -> None:
    with torch.inference_mode(inference), pytest.raises(HostReadError), NoReads():
        work(torch.arange(5.0) - 2)


def test_a_tape_replays_the_host_numbers_of_the_recording_as_a_graph_does() -> None:
    graphs, counter = Graphs(TapeRecorder()), iter(range(100))
    state = torch.zeros(1, dtype=torch.long)

    def wrong() -> Result:
        state.add_(next(counter))  # the recording holds the number
        return Result(state + 0)

    seen = [int(graphs.run("wrong", wrong).tensor) for _ in range(4)]
    assert seen == [0, 1, 2, 3], "each replay adds the 1 of the recording"


# --- Addresses ---


@pytest.mark.slow
def test_buffers_keep_their_addresses_over_a_thousand_rounds() -> None:
    model, skipped = tiny_model("llama", num_hidden_layers=2), SkipSet(attn={1})
    damp(model, skipped, 0.03)
    spec, rounds = taped(model, Plan(skip_set=skipped, gamma=1)), 0
    options = GREEDY | {"max_new_tokens": 450}
    spec.generate(**batch(11, 5), **options)
    before = addresses(spec)
    while rounds < 1000:
        spec.generate(**batch(11, 5), **options)
        rounds += spec.stats.passes
    assert addresses(spec) == before


# --- Compiled as whole graphs ---


SHALLOW = Plan(skip_set=SkipSet(attn={1}), gamma=2)


@pytest.fixture(scope="module")
def shallow() -> PreTrainedModel:
    """A model of two layers: the compiler's time grows with the layers of all passes."""
    model = tiny_model("llama", num_hidden_layers=2)
    damp(model, SHALLOW.skip_set, 0.6)
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("lookup", "backend"), [(None, "inductor"), (LOOKUP, "eager")], ids=["layers", "cascade"])
def test_captured_functions_compile_as_whole_graphs(
    lookup: PromptLookup | None, backend: str, shallow: PreTrainedModel
) -> None:
    plan = SHALLOW.model_copy(update={"prompt_lookup": lookup})
    spec, given = compiled_whole(shallow, plan, backend), batch(11, 5)
    assert torch.equal(spec.generate(**given, **GREEDY), shallow.generate(**given, **GREEDY))
    assert 0 < spec.stats.accepted < spec.stats.drafted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_compiler")
def test_captured_sampling_compiles_as_whole_graphs(shallow: PreTrainedModel) -> None:
    spec = compiled_whole(shallow, SHALLOW, "eager")
    assert_same_draws(fixed_widths(shallow, SHALLOW), spec, batch(11, 5), **SAMPLING | WARPERS)
