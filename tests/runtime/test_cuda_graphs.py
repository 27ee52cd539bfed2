"""Captured rounds: the same tokens, no read of the device but one a round, and addresses that stay.

On a CPU a tape stands in for CUDA graphs (see `tape.py`). The tests marked `gpu` do the same with the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from models import FIRST_DROPPED, PAD, VOCABULARY, damp, damped_model, prompts, tiny_model
from tape import HostReadError, NoReads, TapeRecorder, tensors_of
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, PreTrainedModel, RepetitionPenaltyLogitsProcessor

import selfspec.decoding.round
from selfspec import DecodeOptions, Plan, SelfSpeculator, SkipSet, wrap
from selfspec.models.support import SUPPORTED_MODEL_TYPES
from selfspec.plan import PromptLookup
from selfspec.runtime.cuda_graphs import MAX_GRAPHS, Graphs
from selfspec.runtime.runtime import Runtime

GAMMA = 3
PLAN = Plan(skip_set=FIRST_DROPPED, gamma=GAMMA)
LOOKUP = PromptLookup(gamma=4, min_ngram=1, max_ngram=3)
CASCADE = Plan(skip_set=FIRST_DROPPED, gamma=GAMMA, prompt_lookup=LOOKUP)
NEW_TOKENS = 23
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
SAMPLING = {"do_sample": True, "max_new_tokens": NEW_TOKENS}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return damped_model("llama", FIRST_DROPPED)


def taped(model: PreTrainedModel, plan: Plan = PLAN, **options: Any) -> SelfSpeculator:
    """A speculator whose rounds are recorded on a tape and played."""
    return SelfSpeculator(model, plan, DecodeOptions(**options), recorder=TapeRecorder())


def tape_of(spec: SelfSpeculator) -> TapeRecorder:
    assert spec.runtime.graphs is not None
    recorder = spec.runtime.graphs.recorder
    assert isinstance(recorder, TapeRecorder)
    return recorder


def batch(*lengths: int) -> dict[str, Tensor]:
    tokens, mask = prompts(*lengths)
    return {"input_ids": tokens, "attention_mask": mask}


# --- The same tokens ---


FEW = ("gemma3_text", "llama", "qwen3_moe")
OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in sorted(SUPPORTED_MODEL_TYPES.difference(FEW))]


@pytest.mark.parametrize("family", [*FEW, *OTHERS])
def test_replayed_rounds_write_what_the_model_writes(family: str) -> None:
    model = damped_model(family, FIRST_DROPPED)
    spec, uncaptured, given = taped(model), wrap(model, PLAN), batch(11, 5, 7)
    expected = model.generate(**given, **GREEDY)
    uncaptured.generate(**given, **GREEDY)
    for _ in range(2):  # the second time, from the first round on
        assert torch.equal(spec.generate(**given, **GREEDY), expected)
        assert spec.stats.history == uncaptured.stats.history, "a wrong draft shows in nothing else"
    assert spec.stats.captured
    assert not spec.stats.slower_paths
    assert tape_of(spec).recorded == 2
    assert tape_of(spec).played > spec.stats.passes
    assert 0.2 < spec.stats.acceptance_rate < 0.9


@pytest.mark.parametrize(
    "plan",
    [CASCADE, Plan.none(prompt_lookup=LOOKUP), Plan.none()],
    ids=["cascade", "lookup", "plain"],
)
def test_every_drafter_is_captured(plan: Plan, llama: PreTrainedModel) -> None:
    spec, given = taped(llama, plan), batch(22, 5, 14)
    given["input_ids"][:, -3:] = given["input_ids"][:, :3]  # something to look up in the first row
    expected = llama.generate(**given, **GREEDY)
    assert torch.equal(spec.generate(**given, **GREEDY), expected)
    assert torch.equal(spec.generate(**given, **GREEDY), expected)
    assert spec.stats.captured
    assert tape_of(spec).played > spec.stats.passes
    if plan.gamma:
        assert 0 < spec.stats.accepted < spec.stats.drafted
    assert bool(spec.stats.drafted) == plan.speculates


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (11, 11)], ids=str)
@pytest.mark.parametrize("pad", [-1, VOCABULARY])
@pytest.mark.parametrize("drafts", ["cascade", "draft model"])
def test_what_pads_need_be_no_token_of_the_model(
    drafts: str, pad: int, lengths: tuple[int, ...], captured: bool, llama: PreTrainedModel
) -> None:
    short = {"prompt_lookup": LOOKUP.model_copy(update={"gamma": 1})}
    plan = CASCADE.model_copy(update=short) if drafts != "draft model" else Plan(skip_set=SkipSet(), gamma=GAMMA)
    draft_model, recorder = llama if drafts == "draft model" else None, TapeRecorder() if captured else None
    spec = SelfSpeculator(llama, plan, draft_model=draft_model, recorder=recorder)
    given, options = batch(*lengths), GREEDY | {"pad_token_id": pad}
    given["input_ids"][0] = given["input_ids"][0, 0]  # something to look up in the first row alone
    assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))


WARPERS = {"temperature": 0.8, "top_k": 41, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3}


@pytest.mark.parametrize("options", [{}, WARPERS, {"repetition_penalty": 1.3, "do_sample": False}], ids=str)
@pytest.mark.parametrize("plan", [PLAN, pytest.param(CASCADE, marks=pytest.mark.slow)], ids=["layers", "cascade"])
def test_with_one_seed_replayed_rounds_draw_what_uncaptured_ones_draw(
    options: dict[str, Any], plan: Plan, llama: PreTrainedModel
) -> None:
    given = batch(11, 5, 7)
    written = []
    for spec in (fixed_widths(llama, plan), taped(llama, plan)):
        for seed in (3, 5):
            torch.manual_seed(seed)
            written.append(spec.generate(**given, **SAMPLING | options))
    assert torch.equal(written[0], written[2])
    assert torch.equal(written[1], written[3])
    assert spec.stats.captured
    assert not spec.stats.slower_paths


def fixed_widths(model: PreTrainedModel, plan: Plan) -> SelfSpeculator:
    """A speculator that does the captured work, but does it anew every time."""
    recorder = TapeRecorder()
    recorder.record = lambda work: pytest.fail("nothing is to be recorded")  # type: ignore[method-assign, assignment]
    spec = SelfSpeculator(model, plan, recorder=recorder)
    spec.runtime.graphs.run = lambda key, work: work()  # type: ignore[method-assign]
    return spec


def test_rows_end_at_their_own_stop_tokens(llama: PreTrainedModel) -> None:
    given = batch(11, 5, 7)
    free = llama.generate(**given, **GREEDY)
    stops = {"eos_token_id": [int(free[0, 11 + 13]), int(free[1, 11 + 5])], "pad_token_id": PAD}
    expected = llama.generate(**given, **GREEDY | stops)
    spec = taped(llama)
    for _ in range(2):
        assert torch.equal(spec.generate(**given, **GREEDY | stops), expected)
    assert spec.stats.captured


def test_more_stop_tokens_than_there_is_room_for_are_served_uncaptured(llama: PreTrainedModel) -> None:
    given, stops = batch(11, 5), {"eos_token_id": list(range(17)), "pad_token_id": PAD}
    spec = taped(llama)
    assert torch.equal(spec.generate(**given, **GREEDY | stops), llama.generate(**given, **GREEDY | stops))
    assert spec.stats.slower_paths == [
        "rounds are not captured: there are 17 stop tokens, and captured rounds have room for 16"
    ]


def test_one_graph_serves_requests_of_other_lengths_limits_and_stop_tokens(llama: PreTrainedModel) -> None:
    spec = taped(llama)
    for lengths, limit, stop in (((11, 5), 23, 7), ((3, 17), 41, 3), ((2, 2), 1, 5), ((13, 1), 2, None)):
        options = {"do_sample": False, "max_new_tokens": limit, "eos_token_id": stop, "pad_token_id": PAD}
        given = batch(*lengths)
        assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
    assert tape_of(spec).recorded == 2


def test_other_settings_are_captured_anew_and_never_mixed_up(llama: PreTrainedModel) -> None:
    spec, given = taped(llama), batch(11)
    for penalty in (1.0, 1.5, 1.0, 1.5):
        options = GREEDY | {"repetition_penalty": penalty}
        assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
    assert tape_of(spec).recorded == 4


@pytest.mark.parametrize("ignored", [4, 11])
def test_a_penalty_that_ignores_more_than_padding_is_right_and_not_captured(
    ignored: int, llama: PreTrainedModel
) -> None:
    given = batch(11, 5)
    for penalty in (0.1, 3.0):
        processor = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=torch.full((2,), ignored))
        options = GREEDY | {"logits_processor": LogitsProcessorList([processor])}
        spec = taped(llama)
        assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
        assert "ignores other tokens than padding is not captured" in spec.stats.slower_paths[0]


def test_a_processor_with_a_tensor_among_its_settings_is_not_captured(llama: PreTrainedModel) -> None:
    spec, processors = taped(llama), LogitsProcessorList([MinPLogitsWarper(min_p=torch.tensor(0.3))])
    spec.generate(**batch(11), **SAMPLING, logits_processor=processors)
    assert spec.stats.slower_paths == [
        "rounds are not captured: MinPLogitsWarper with a tensor among its settings is not captured"
    ]


def test_a_streamer_needs_no_further_read(llama: PreTrainedModel, reads: list[str]) -> None:
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
    assert len(reads) == alone + 1, "one for the prompt, which goes to the CPU"
    assert len(put) == 1 + NEW_TOKENS


def test_kept_scores_and_logits_are_those_of_each_round(llama: PreTrainedModel) -> None:
    spec, given = taped(llama), batch(11, 5)
    options = GREEDY | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = llama.generate(**given, **options)
    for _ in range(2):
        output = spec.generate(**given, **options)
    for ours, theirs in ((output.scores, expected.scores), (output.logits, expected.logits)):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-4)


# --- What is not captured ---


def test_a_plan_with_an_exit_threshold_is_not_captured_and_stats_say_so(llama: PreTrainedModel) -> None:
    spec, given = taped(llama, PLAN.model_copy(update={"exit_threshold": 0.4})), batch(11, 5)
    assert torch.equal(spec.generate(**given, **GREEDY), llama.generate(**given, **GREEDY))
    assert spec.stats.slower_paths == [
        "rounds are not captured: with an exit threshold, drafts end when the device says so"
    ]
    assert tape_of(spec).recorded == 0


def test_another_processor_is_not_captured_and_stats_say_so(llama: PreTrainedModel) -> None:
    spec, given, options = taped(llama), batch(11, 5), GREEDY | {"no_repeat_ngram_size": 2}
    assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
    assert spec.stats.slower_paths == ["rounds are not captured: NoRepeatNGramLogitsProcessor is not captured"]


def test_a_capture_that_fails_leaves_the_tokens_right_and_the_reason(llama: PreTrainedModel) -> None:
    class Failing(TapeRecorder):
        def record(self, work: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing\nand a page of advice")

    spec, given = SelfSpeculator(llama, PLAN, recorder=Failing()), batch(11, 5)
    assert torch.equal(spec.generate(**given, **GREEDY), llama.generate(**given, **GREEDY))
    assert spec.stats.slower_paths == ["rounds are not captured: operation not permitted when stream is capturing"]


def test_graphs_are_not_made_where_they_are_not_wanted(llama: PreTrainedModel) -> None:
    assert wrap(llama, PLAN).runtime.graphs is None  # a CPU has none
    spec = wrap(llama, PLAN, graphs=True)
    spec.generate(**batch(11), **GREEDY)
    assert spec.stats.slower_paths == ["rounds are not captured: CUDA graphs need a GPU, but the model is on cpu"]


# --- When graphs are dropped ---


def test_a_cache_that_grows_drops_its_graphs(llama: PreTrainedModel) -> None:
    spec = taped(llama)
    spec.generate(**batch(11), **GREEDY)
    assert len(spec.runtime.graphs or ()) == 2
    given, options = batch(11), GREEDY | {"max_new_tokens": 173}
    assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
    assert tape_of(spec).recorded == 4
    assert len(spec.runtime.graphs or ()) == 2


def test_another_skip_set_drops_the_graphs(llama: PreTrainedModel) -> None:
    spec = taped(llama)
    spec.generate(**batch(11), **GREEDY)
    spec.runtime.draft_with(PLAN.skip_set)
    assert len(spec.runtime.graphs or ()) == 0


def test_ever_new_settings_do_not_pile_up_graphs() -> None:
    graphs, done = Graphs(TapeRecorder()), []
    for key in range(2 * MAX_GRAPHS + 1):
        for _ in range(2):
            graphs.run(key, lambda: Result(torch.ones(1)))
        done.append(len(graphs))
    assert max(done) == MAX_GRAPHS


def test_a_check_never_reads_a_draft_of_an_earlier_graph(llama: PreTrainedModel) -> None:
    spec, given = taped(llama), batch(11, 5)
    expected = spec.generate(**given, **GREEDY)
    history = spec.stats.history
    graphs = spec.runtime.graphs
    assert graphs is not None
    run, calls = graphs.run, iter(range(1000))

    def forgetful(key: Any, work: Any) -> Any:
        if next(calls) % 7 == 5:  # between a draft and its check, as when too many graphs have piled up
            graphs.drop()
        return run(key, work)

    graphs.run = forgetful  # type: ignore[method-assign]
    for _ in range(3):
        assert torch.equal(spec.generate(**given, **GREEDY), expected)
        assert spec.stats.history == history, "a stale draft would be checked as well, but seldom accepted"


class Result:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


# --- One read a round ---


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every way in which Python reads a tensor, as it happens."""
    seen: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu"):
        method = getattr(Tensor, name)

        def reading(self: Tensor, *args: Any, _name: str = name, _method: Any = method, **kwargs: Any) -> Any:
            seen.append(_name)
            return _method(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, reading)
    return seen


@pytest.mark.parametrize(
    "options", [pytest.param(GREEDY, marks=pytest.mark.slow), SAMPLING | WARPERS], ids=["greedy", "sampling"]
)
@pytest.mark.parametrize("plan", [PLAN, CASCADE, Plan.none()], ids=["layers", "cascade", "plain"])
def test_the_host_reads_once_a_round_and_nothing_else_reads(
    plan: Plan, options: dict[str, Any], llama: PreTrainedModel, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = taped(llama, plan)
    rounds: list[list[str]] = []
    step = selfspec.decoding.round.step

    def counted(*args: Any) -> Any:
        before = len(reads)
        with NoReads():
            committed = step(*args)
        rounds.append(reads[before:])
        return committed

    monkeypatch.setattr(selfspec.decoding.round, "step", counted)
    for _ in range(2):
        spec.generate(**batch(11, 5, 7), **options)
    assert len(rounds) > NEW_TOKENS // (1 + plan.longest_draft)
    assert all(seen == ["tolist"] for seen in rounds), "one read: that of `read`"


def test_stop_strings_and_time_limits_need_no_further_read(
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
def test_what_a_graph_forbids_is_noticed(work: Any, inference: bool) -> None:
    with torch.inference_mode(inference), pytest.raises(HostReadError), NoReads():
        work(torch.arange(5.0) - 2)


def test_a_number_that_the_host_computed_while_recording_gives_wrong_results_on_a_tape() -> None:
    graphs, counter = Graphs(TapeRecorder()), iter(range(100))
    state = torch.zeros(1, dtype=torch.long)

    def wrong() -> Result:
        state.add_(next(counter))  # baked in
        return Result(state + 0)

    seen = [int(graphs.run("wrong", wrong).tensor) for _ in range(4)]
    assert seen == [0, 1, 2, 3], "a tape adds the 1 of its recording for ever"


# --- Addresses ---


def addresses(spec: SelfSpeculator) -> list[int]:
    runtime = spec.runtime
    tensors = [tensor for index in runtime.views.layer_shapes for tensor in runtime.cache.layer(index)]
    tensors += [runtime.cache.lengths, *tensors_of(runtime.row_buffers)]
    assert runtime.graphs is not None
    results = [result for _, result in runtime.graphs._captured.values()]
    return [tensor.data_ptr() for tensor in tensors + [t for result in results for t in tensors_of(result)]]


@pytest.mark.slow
def test_buffers_keep_their_addresses_over_a_thousand_rounds() -> None:
    model, skipped = tiny_model("llama", num_hidden_layers=3), SkipSet(attn={1}, mlp={2})
    damp(model, skipped, 0.03)
    spec, rounds = taped(model, Plan(skip_set=skipped, gamma=GAMMA)), 0
    options = GREEDY | {"max_new_tokens": 450}
    spec.generate(**batch(11, 5), **options)
    before = addresses(spec)
    while rounds < 1000:
        spec.generate(**batch(11, 5), **options)
        rounds += spec.stats.passes
    assert addresses(spec) == before


# --- Compiled whole ---


def compiled_whole(model: PreTrainedModel, plan: Plan, backend: str) -> SelfSpeculator:
    """Every captured function compiled as one graph, which a read of the device would break."""
    spec = fixed_widths(model, plan)
    runtime = spec.runtime
    assert runtime.graphs is not None
    # Inference mode holds already, around every round: entered again within, it would be compiled, too.
    runtime.run = MethodType(Runtime.run.__wrapped__, runtime)  # type: ignore[attr-defined, method-assign]
    compiled: dict[Any, Any] = {}
    first: dict[Any, Any] = {}

    def run(key: Any, work: Any) -> Any:
        if key not in compiled:
            compiled[key] = torch.compile(work, fullgraph=True, dynamic=False, backend=backend)
        result = compiled[key]()
        # As a graph's results do, they lie where the first ones lay; else every check would be of another draft.
        kept = first.setdefault(key, result)
        for old, new in zip(tensors_of(kept), tensors_of(result), strict=True):
            old.copy_(new)
        return kept

    runtime.graphs.run = run  # type: ignore[method-assign]
    return spec


@pytest.fixture
def no_warnings_of_the_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_warnings_of_the_compiler")
@pytest.mark.parametrize(("plan", "backend"), [(PLAN, "inductor"), (CASCADE, "eager")], ids=["layers", "cascade"])
def test_captured_functions_compile_as_whole_graphs_with_the_same_tokens(
    plan: Plan, backend: str, llama: PreTrainedModel
) -> None:
    spec, given = compiled_whole(llama, plan, backend), batch(11, 5)
    assert torch.equal(spec.generate(**given, **GREEDY), llama.generate(**given, **GREEDY))
    assert 0 < spec.stats.accepted < spec.stats.drafted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_warnings_of_the_compiler")
def test_captured_functions_that_sample_compile_as_whole_graphs(llama: PreTrainedModel) -> None:
    spec, given = compiled_whole(llama, PLAN, "eager"), batch(11, 5)
    uncompiled = fixed_widths(llama, PLAN)
    written = []
    for one in (uncompiled, spec):
        torch.manual_seed(7)
        written.append(one.generate(**given, **SAMPLING | WARPERS))
    assert torch.equal(*written)
