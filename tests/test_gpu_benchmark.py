"""The GPU benchmark: its arithmetic against hand-computed cases, and the whole of it at toy sizes on a CPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from selfspec import InputError, SkipSet

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import midsize
from gpu_bench import budget as budget_module
from gpu_bench import ceilings as ceilings_module
from gpu_bench import timing as timing_module
from gpu_bench.agreement import Dial, drafted_agreement, find_scale, published_share, write
from gpu_bench.aims import judge_aims
from gpu_bench.budget import Budget, LeftOutError
from gpu_bench.ceilings import Ceilings, copy_bandwidth, matmul_rate
from gpu_bench.cells import Cell, CellBench
from gpu_bench.effort import TOY
from gpu_bench.limits import (
    PassTimes,
    bandwidth_limit,
    best_gamma,
    expected_tokens,
    ideal_speedup,
    kv_bytes,
    weight_bytes,
)
from gpu_bench.passes import pass_seconds
from gpu_bench.real import missing
from gpu_bench.run import AIMED
from gpu_bench.shapes import LLAMA_8B, QWEN3_32B, TOY_LLAMA, TOY_QWEN3
from gpu_bench.subject import Subject
from gpu_bench.timing import CALLS, FEWEST, decode_seconds, median_seconds
from midsize_model.size import REAL as REAL_SIZE
from midsize_model.size import TOY as TOY_SIZE
from midsize_model.sources import Stream
from midsize_model.training import new_model

BENCHMARKS = Path(gpu.__file__).parent
CPU = torch.device("cpu")


# --- Limits ---


def small_model(*, tied: bool) -> LlamaForCausalLM:
    """3 layers of 3630 weights, a last norm of 30, and 211 x 30 for the embedding and for the head."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=211,
            hidden_size=30,
            intermediate_size=13,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )


def test_the_bandwidth_limit_reads_every_weight_once_a_looked_up_row_per_token_and_the_whole_cache() -> None:
    model = small_model(tied=False)
    assert weight_bytes(model, 5) == 4 * (3 * 3630 + 30 + 211 * 30) + 4 * 5 * 30 == 69_600
    assert kv_bytes(model, 5, 17) == 2 * 3 * 10 * 5 * 17 * 4 == 20_400
    assert bandwidth_limit(model, 5, 17, 1_800_000) == pytest.approx(100)  # 20 passes a second, 5 tokens each


def test_a_head_that_is_tied_to_the_embedding_is_read_once() -> None:
    assert weight_bytes(small_model(tied=True), 5) == 4 * (3 * 3630 + 30 + 211 * 30)


def test_cached_bytes_follow_a_head_size_of_the_config_s_own() -> None:
    model = TOY_QWEN3.build(CPU, 0)
    assert kv_bytes(model, 3, 7) == 2 * 5 * 2 * 20 * 3 * 7 * 4


def test_the_ideal_speedup_is_tokens_times_a_plain_pass_over_the_round_s_passes() -> None:
    passes = PassTimes(plain=7.0, draft=2.0, verify=11.0)
    assert ideal_speedup(3.0, 5, passes) == pytest.approx(3 * 7 / (5 * 2 + 11))
    assert passes.draft_cost == pytest.approx(2 / 7)


@pytest.mark.parametrize(
    ("agreement", "cost", "speedup"), [(0.9, 0.55, 1.30), (0.9, 0.45, 1.46), (0.9, 0.28, 1.95), (0.9, 0.1, 3.43)]
)
def test_the_best_draft_length_reaches_the_ceilings_of_the_design(
    agreement: float, cost: float, speedup: float
) -> None:
    gamma = best_gamma(agreement, cost)
    assert expected_tokens(agreement, gamma) / (gamma * cost + 1) == pytest.approx(speedup, abs=0.005)
    assert expected_tokens(agreement, gamma) == pytest.approx((1 - agreement ** (gamma + 1)) / (1 - agreement))


def test_the_real_shapes_have_as_many_parameters_as_the_models_they_are_named_after() -> None:
    assert LLAMA_8B.bytes == 2 * 8_030_261_248
    assert QWEN3_32B.bytes == 2 * 32_762_123_264


# --- Timing ---


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def decoder(self, start: float, per_token: float) -> Callable[[int], None]:
        def decode(n: int) -> None:
            self.now += start + per_token * n

        return decode


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing_module, "perf_counter", clock)
    monkeypatch.setattr(budget_module, "perf_counter", clock)
    return clock


def test_decoding_is_timed_without_what_comes_before_its_tokens(clock: Clock) -> None:
    decoders = {"plain": clock.decoder(5.0, 3.0), "ours": clock.decoder(11.0, 2.0)}
    seconds = decode_seconds(decoders, CPU, new_tokens=FEWEST + 7, repeats=3)
    assert seconds == {"plain": pytest.approx(3.0), "ours": pytest.approx(2.0)}


def test_decoding_that_takes_no_time_is_refused_and_not_reported(clock: Clock) -> None:
    with pytest.raises(InputError, match="plain took no longer for 11 tokens than for 2"):
        decode_seconds({"plain": clock.decoder(5.0, 0.0)}, CPU, new_tokens=11, repeats=3)


def test_a_cell_s_speed_counts_all_rows_of_one_batch(clock: Clock) -> None:
    bench = CellBench(Subject(TOY_LLAMA, CPU, 0), Cell(shape="toy", rows=1, context=11, agreement=0.9), TOY)
    assert len(bench.batches) == TOY.prompts == 2  # decoded one after the other
    decoders = {"plain": clock.decoder(5.0, 2 * 0.125), "ours": clock.decoder(5.0, 2 * 0.0625)}
    seconds = bench.seconds_per_token(decoders)
    assert seconds == {"plain": pytest.approx(0.125), "ours": pytest.approx(0.0625)}
    many = CellBench(bench.subject, Cell(shape="toy", rows=7, context=11, agreement=0.9), TOY)
    speeds = many._speeds(seconds, Ceilings(copy_bytes_per_second=1e9, matmul_flops=1e12))
    assert speeds["plain_tokens_per_second"] == pytest.approx(7 * 8)
    assert speeds["ours_tokens_per_second"] == pytest.approx(7 * 16)


def test_a_call_s_time_is_a_stretch_s_over_its_calls(clock: Clock) -> None:
    decode = clock.decoder(3.0, 0.0)
    assert median_seconds({"it": lambda: decode(1)}, CPU, repeats=5) == {"it": pytest.approx(3.0)}
    assert clock.now == pytest.approx(3.0 * CALLS * (5 + 1))  # one stretch more, which warms up


def test_a_copy_counts_what_it_reads_and_what_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings_module, "median_seconds", lambda calls, device, repeats: dict.fromkeys(calls, 2.0))
    assert copy_bandwidth(CPU, 4 * 1009, 3) == 4 * 1009  # twice as many bytes, in two seconds
    assert matmul_rate(CPU, 13, 3) == 13**3  # twice as many operations, in two seconds


# --- Budget ---


def test_a_stage_that_the_time_left_is_not_enough_for_is_skipped_and_says_so(clock: Clock) -> None:
    budget = Budget(seconds=101)
    assert budget.run("one", 7, lambda: clock.decoder(60.0, 0.0)(1) or "done") == "done"
    assert budget.run("other", 43, lambda: "done") is None
    one, other = budget.stages
    assert (one.status, one.seconds) == ("done", 60)
    assert (other.status, other.reason) == (
        "skipped",
        "it may take 43 s, and 41 s of 101 s are left; give a longer --budget",
    )


def test_a_stage_is_expected_to_take_as_long_as_the_longest_of_its_kind(clock: Clock) -> None:
    budget = Budget(seconds=100)
    for seconds in (31, 17):
        budget.run(f"{seconds}", 1, lambda seconds=seconds: clock.decoder(seconds, 0)(1), kind="cell")
    budget.run("fits", 50, lambda: None, kind="cell")
    clock.now += 23  # of 52 that were left
    budget.run("does not", 1, lambda: None, kind="cell")
    assert [stage.status for stage in budget.stages] == ["done", "done", "done", "skipped"]
    assert "it may take 31 s, and 29 s" in budget.stages[-1].reason


def test_a_stage_that_fails_leaves_the_others_their_turn() -> None:
    def fail(error: Exception) -> None:
        raise error

    told: list[str] = []
    budget = Budget(seconds=11, tell=lambda stage: told.append(stage.status))
    budget.run("broken", 0, lambda: fail(RuntimeError("first line\nsecond")))
    budget.run("refused", 0, lambda: fail(InputError("no such model")))
    budget.run("left out", 0, lambda: fail(LeftOutError("too big")))
    budget.run("too large", 0, lambda: fail(torch.OutOfMemoryError("CUDA out of memory")))
    assert budget.run("next", 0, lambda: 5) == 5
    assert told == ["failed", "failed", "skipped", "skipped", "done"]
    assert budget.stages[0].reason == "RuntimeError: first line second"
    assert budget.stages[2].reason == "too big"


def test_a_mistake_in_the_code_is_not_taken_for_a_stage_s_failure() -> None:
    with pytest.raises(ZeroDivisionError):
        Budget(seconds=11).run("mistaken", 0, lambda: 1 // 0)


def test_aims_are_open_until_they_were_measured() -> None:
    cell = {"shape": "8B", "rows": 1, "context": 512, "agreement_wanted": 0.9, "share_of_limit": 0.86}
    other = {**cell, "rows": 4, "share_of_limit": 0.5}
    aims = judge_aims("8B", [other, {**cell, "efficiency": 0.94}], None, {"seconds": 119.0})
    assert [aim.met for aim in aims] == [True, False, None, None, True]
    assert [aim.measured for aim in judge_aims("8B", [other], None, None)] == [None] * 5


# --- Agreement ---


@pytest.mark.parametrize("wanted", [0.7, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_the_scale_is_found_for_any_agreement(wanted: float, power: float) -> None:
    tried: list[float] = []

    def agreement_at(scale: float) -> float:
        tried.append(scale)
        return 1 - 0.97 * scale**power

    scale, agreement = find_scale(agreement_at, wanted, guess=0.03, tolerance=0.005, steps=20)
    assert agreement == agreement_at(scale)
    assert abs(agreement - wanted) <= 0.005
    assert all(0 < one <= 1 for one in tried)
    assert len(tried) <= 13


def test_an_agreement_out_of_reach_gets_the_nearest_there_is() -> None:
    tried: list[float] = []

    def agreement_at(scale: float) -> float:
        tried.append(scale)
        return 0.93 - 0.8 * scale

    scale, agreement = find_scale(agreement_at, 0.95, guess=0.1, tolerance=0.005, steps=7)
    assert len(tried) == 7
    assert scale == min(tried)
    assert agreement == pytest.approx(0.93, abs=0.01)


def test_the_published_share_is_45_percent_and_spares_the_first_and_the_last_layer() -> None:
    skip_set = published_share(32)
    assert (len(skip_set.attn), len(skip_set.mlp)) == (19, 10)
    assert len(skip_set) / 64 == pytest.approx(0.45, abs=0.01)
    assert not {0, 31} & (skip_set.attn | skip_set.mlp)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def test_the_dial_scales_the_skipped_projections_and_leaves_nothing_behind() -> None:
    model = TOY_LLAMA.build(CPU, 3)
    before, dial = weights(model), Dial(model, 3)
    dial.turn(SkipSet(attn={1, 4}, mlp={4}), 0.37)
    dial.turn(SkipSet(attn={4, 5}, mlp={2}), 0.11)
    names = {f"model.layers.{n}.self_attn.o_proj.weight" for n in (4, 5)} | {"model.layers.2.mlp.down_proj.weight"}
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name] * 0.11 if name in names else before[name]), name


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    one = weights(TOY_QWEN3.build(CPU, 7))
    torch.manual_seed(11)
    same, other = weights(TOY_QWEN3.build(CPU, 7)), weights(TOY_QWEN3.build(CPU, 8))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("shape", [TOY_LLAMA, TOY_QWEN3], ids=lambda shape: shape.name)
def test_the_scale_takes_agreement_from_certain_to_poor_and_text_does_not_loop(shape: Any) -> None:
    subject = Subject(shape, CPU, 0)
    spec, batches = subject.drafting(subject.skip_set, 3), subject.prompts(2, 1, 13)
    subject.dial.turn(subject.skip_set, 0.0)
    assert drafted_agreement(spec, batches, 31) == 1.0
    subject.dial.turn(subject.skip_set, 1.0)
    assert drafted_agreement(spec, batches, 31) < 0.5
    for prompts in batches:
        text = write(subject.plain(), prompts, 31)[0]
        assert len(text.unique()) > 0.6 * len(text)


def test_a_pass_in_isolation_leaves_the_cache_as_long_as_it_was_told() -> None:
    subject = Subject(TOY_LLAMA, CPU, 0)
    spec, prompts = subject.drafting(subject.skip_set, 3), subject.prompts(1, 3, 11)[0]
    write(spec, prompts, 13)
    seconds = pass_seconds(spec.runtime, {"it": ("target", prompts[:, :4])}, context=17, repeats=3)
    assert seconds["it"] > 0
    assert spec.runtime.cache.lengths.tolist() == [17, 17, 17]


# --- The mid-size model ---


def test_the_mid_size_model_has_about_100_million_parameters_and_24_layers_or_more() -> None:
    class Vocabulary:
        bos_token_id = eos_token_id = pad_token_id = 0

        def __len__(self) -> int:
            return REAL_SIZE.vocabulary

    with torch.device("meta"):
        model = new_model(REAL_SIZE, Vocabulary(), 0)  # type: ignore[arg-type]
    assert 95e6 < sum(parameter.numel() for parameter in model.parameters()) < 115e6
    assert model.config.num_hidden_layers >= 24
    assert max(REAL_SIZE.draft_spec.exit_layers) < REAL_SIZE.layers


class Letters:
    """A tokenizer of letters."""

    eos_token_id = 0

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_the_stream_is_all_documents_in_order_and_its_windows_depend_on_the_step_alone() -> None:
    texts = ["abc" * 5, "de" * 7, "f" * 11]
    stream = Stream(iter(texts), Letters(), CPU, 3)  # type: ignore[arg-type]
    assert "".join(map(chr, stream.tokens.tolist())) == "".join(text + "\0" for text in texts)
    one, other = (stream.batch(step, rows=5, length=7) for step in (0, 1))
    assert one.shape == (5, 8)
    assert torch.equal(one, stream.batch(0, rows=5, length=7))
    assert not torch.equal(one, other)
    whole = "".join(map(chr, stream.tokens.tolist()))
    assert all("".join(map(chr, row)) in whole for row in one.tolist())


def test_a_missing_mid_size_model_names_the_command_that_trains_one(tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    assert missing(folder) == f"no model in {folder}; train one with 'python benchmarks/midsize.py --out {folder}'"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert missing(folder) is None


@pytest.mark.parametrize("minutes", ["0", "-3"])
def test_no_time_to_train_is_refused(minutes: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--minutes is {minutes}"):
        midsize.main(["--toy", "--minutes", minutes, "--out", str(tmp_path / "model")])


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        midsize.main(["--toy", "--out", str(tmp_path / "file" / "model")])


# --- The whole run ---


@pytest.mark.parametrize("script", [gpu, midsize])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_both_scripts_point_to_the_toy(script: Any, tmp_path: Path) -> None:
    option = "--midsize" if script is gpu else "--out"
    with pytest.raises(InputError, match=r"no CUDA device here.*--toy"):
        script.main([option, str(tmp_path / "model")])


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(InputError, match="device 'abacus' is unknown"):
        gpu.main(["--toy", "--device", "abacus"])


def test_a_run_without_time_measures_the_ceilings_and_names_all_that_it_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = gpu.main(["--toy", "--budget", "0.5", "--midsize", str(tmp_path)])
    statuses = {stage["name"]: stage["status"] for stage in result["stages"]}
    assert statuses.pop("ceilings") == "done"
    assert len(statuses) == 9
    assert set(statuses.values()) == {"skipped"}
    reasons = {stage["name"]: stage["reason"] for stage in result["stages"][1:]}
    assert "python benchmarks/midsize.py" in reasons.pop("mid-size model")
    assert all("--budget" in reason for reason in reasons.values())
    out = capsys.readouterr().out
    assert all(name in out for name in statuses)
    assert json.loads(out.splitlines()[-1])["cells"] == []


@dataclass(frozen=True)
class Ran:
    """A toy run of both commands."""

    result: dict[str, Any]
    out: str
    written: dict[str, Any]
    trained: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("gpu")
    patched = pytest.MonkeyPatch()
    patched.setenv("SELFSPEC_CACHE", str(folder / "cache"))
    model, file = folder / "model", folder / "gpu.json"

    def run(script: str, *arguments: object) -> str:
        command = [sys.executable, str(BENCHMARKS / script), "--toy", *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    trained = json.loads(run("midsize.py", "--out", model).splitlines()[-1])
    out = run("gpu.py", "--midsize", model, "--out", file)
    yield Ran(json.loads(out.splitlines()[-1]), out, json.loads(file.read_text()), trained, model)
    patched.undo()


@pytest.mark.slow
def test_the_toy_run_measures_every_stage_and_ends_with_json(ran: Ran) -> None:
    statuses = {stage["name"]: stage["status"] for stage in ran.result["stages"]}
    assert set(statuses.values()) == {"done"}, ran.out
    assert len(statuses) == 10
    assert ran.written == ran.result
    assert ran.result["ceilings"]["copy_bytes_per_second"] > 1e8
    assert {(cell["shape"], cell["rows"], cell["agreement_wanted"]) for cell in ran.result["cells"]} == {
        *(("toy Llama", rows, agreement) for rows in (1, 3) for agreement in (0.9, 0.7)),
        *(("toy Qwen3", 1, agreement) for agreement in (0.9, 0.7)),
    }
    assert ran.result["aims"] == []  # they are about real sizes


@pytest.mark.slow
def test_every_cell_of_the_toy_run_says_what_was_set_and_is_consistent(ran: Ran) -> None:
    for cell in ran.result["cells"]:
        assert cell["basis"] == "time real, agreement set"
        assert cell["agreement"] == pytest.approx(cell["agreement_wanted"], abs=0.1)
        assert 0 < cell["scale"] <= 1
        assert cell["gamma"] >= 1
        assert 1 < cell["tokens_per_round"] <= cell["gamma"] + 1
        assert cell["differing_tokens"] == 0  # in float32
        assert cell["distinct_tokens"] > 0.5
        times = PassTimes(**cell["pass_seconds"])
        assert cell["ideal_speedup"] == pytest.approx(ideal_speedup(cell["tokens_per_round"], cell["gamma"], times))
        assert cell["speedup"] == pytest.approx(cell["ours_tokens_per_second"] / cell["plain_tokens_per_second"])
        assert cell["efficiency"] == pytest.approx(cell["speedup"] / cell["ideal_speedup"])
        # A token takes a pass and what the loop adds. A busy machine is no precise clock.
        assert 0.1 < cell["plain_tokens_per_second"] * times.plain / cell["rows"] < 5
        assert 0.1 < cell["efficiency"] < 10


@pytest.mark.slow
def test_the_toy_run_s_limit_is_that_of_its_own_bandwidth(ran: Ran) -> None:
    cell = next(cell for cell in ran.result["cells"] if cell["rows"] == 3)
    context = 13 + TOY.new_tokens / 2
    bandwidth = ran.result["ceilings"]["copy_bytes_per_second"]
    limit = bandwidth_limit(TOY_LLAMA.build(CPU, 0), 3, context, bandwidth)
    assert cell["limit_tokens_per_second"] == pytest.approx(limit)
    assert cell["share_of_limit"] == pytest.approx(cell["plain_tokens_per_second"] / limit)


@pytest.mark.slow
def test_the_toy_run_holds_ours_against_hugging_face_s_ways_and_searches(ran: Ran) -> None:
    peers, ours = ran.result["peers"], ran.result["cells"][0]["ours_tokens_per_second"]
    assert ran.result["cells"][0]["agreement_wanted"] == AIMED
    assert set(peers["ours_over"]) == {"model.generate", "assistant_early_exit"}
    for name, speed in peers["tokens_per_second"].items():
        assert peers["ours_over"][name] == pytest.approx(ours / speed)
    assert peers["early_exit_agreement"] == pytest.approx(AIMED, abs=0.1)
    search = ran.result["search"]
    assert search["trials_whole"] + search["trials_ended_early"] == TOY.search_trials
    assert search["seconds"] >= sum(search["phases_s"].values())


@pytest.mark.slow
def test_the_toy_run_measures_the_trained_model_with_all_decoders(ran: Ran) -> None:
    measured = ran.result["midsize"]
    names = {score["name"] for score in measured["scores"]}
    assert names | {name.split()[0] for name in measured["absent"]} == {
        "model.generate",
        "plain",
        "assistant_early_exit",
        "prompt_lookup",
        "selfspec",
    }
    assert all(score["differing_tokens"] == 0 for score in measured["scores"])
    assert measured["replay_equals_decoding_in_every_round"]
    assert measured["model"]["held_out_loss"] == ran.trained["held_out_loss"]


@pytest.mark.slow
def test_a_toy_training_learns_something_and_leaves_a_whole_model(ran: Ran) -> None:
    assert ran.trained["held_out_loss"] < math.log(TOY_SIZE.vocabulary) - 0.3  # that of knowing nothing
    assert ran.trained["tokens_seen"] == ran.trained["steps"] * TOY_SIZE.rows * TOY_SIZE.length > 0
    files = {file.name for file in ran.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "calibration.jsonl", "held_out.jsonl"} <= files


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--toy", "--device", "abacus"]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "error: device 'abacus' is unknown; give 'cuda' or 'cpu'\n"


# --- On a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_cell_is_measured_on_cuda(dtype: torch.dtype, rows: int) -> None:
    subject = Subject(replace(TOY_LLAMA, dtype=dtype), torch.device("cuda"), 0)
    cell = Cell(shape="toy", rows=rows, context=37, agreement=0.9)
    ceilings = Ceilings(copy_bytes_per_second=1e12, matmul_flops=1e14)
    measured = CellBench(subject, cell, TOY).measure(ceilings)
    assert measured["agreement"] == pytest.approx(0.9, abs=0.1)
    assert all(seconds > 0 for seconds in measured["pass_seconds"].values())
    assert math.isfinite(measured["efficiency"])
    if dtype == torch.float32:
        assert measured["differing_tokens"] == 0


@pytest.mark.gpu
def test_the_toy_run_works_on_cuda(tmp_path: Path) -> None:
    result = gpu.main(["--toy", "--device", "cuda", "--midsize", str(tmp_path)])
    statuses = {stage["name"]: stage["status"] for stage in result["stages"]}
    assert statuses.pop("mid-size model") == "skipped"
    assert set(statuses.values()) == {"done"}, result["stages"]
    assert result["driver"]
