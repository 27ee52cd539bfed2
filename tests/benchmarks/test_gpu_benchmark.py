"""The GPU benchmark: a cell's speeds, the mid-size model, and a toy run on a CPU."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import midsize
import pytest
import torch
from midsize_model.size import REAL as REAL_SIZE
from midsize_model.size import TOY as TOY_SIZE
from midsize_model.sources import Stream
from midsize_model.training import new_model
from shapes import skip_cells as skip_cells_module
from shapes.ceilings import Ceilings
from shapes.effort import TOY
from shapes.gpu_run import FIRST_AGREEMENT
from shapes.limits import PassTimes, bandwidth_limit, ideal_speedup
from shapes.shape import TOY_LLAMA, in_float32
from shapes.skip_cells import Cell, CellBench
from shapes.subject import Subject
from shapes.trained import missing

from selfspec import InputError

CPU = torch.device("cpu")


def test_the_speed_of_a_cell_counts_all_rows_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skip_cells_module, "decode_seconds", lambda *_, **how: {"plain": 2 * 0.125, "ours": 2 * 0.0625})
    bench = CellBench(Subject(TOY_LLAMA, CPU, 0), Cell(shape="toy", rows=1, context=11, agreement=0.9), TOY)
    assert len(bench.batches) == TOY.prompts == 2  # decoded one after the other
    seconds = bench.seconds_per_token({})
    assert seconds == {"plain": pytest.approx(0.125), "ours": pytest.approx(0.0625)}
    many = CellBench(bench.subject, Cell(shape="toy", rows=7, context=11, agreement=0.9), TOY)
    speeds = many._speeds(seconds, Ceilings(copy_bytes_per_second=1e9, matmul_flops=1e12))
    assert speeds["plain_tokens_per_second"] == pytest.approx(7 * 8)
    assert speeds["ours_tokens_per_second"] == pytest.approx(7 * 16)


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
    assert max(REAL_SIZE.recipe.exit_layers) < REAL_SIZE.layers


class Letters:
    """A tokenizer of letters."""

    eos_token_id = 0

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_the_stream_holds_all_documents_in_order_and_windows_depend_on_the_step_only() -> None:
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
def test_a_training_time_that_is_not_positive_is_refused(minutes: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--minutes is {minutes}"):
        midsize.main(["--toy", "--minutes", minutes, "--out", str(tmp_path / "model")])


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        midsize.main(["--toy", "--out", str(tmp_path / "file" / "model")])


# --- The whole run ---


def statuses_of(result: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in result["stages"]}


@pytest.mark.parametrize("script", [gpu, midsize])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_both_scripts_suggest_the_toy_run(script: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no CUDA device here.*--toy"):
        script.main(["--out", str(tmp_path / "out")])


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(InputError, match="device 'abacus' is unknown"):
        gpu.main(["--toy", "--device", "abacus"])


def test_a_run_without_time_measures_the_ceilings_and_names_all_skipped_stages(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = gpu.main(["--toy", "--budget", "0.5"])
    statuses = statuses_of(result)
    assert statuses.pop("ceilings") == "done"
    assert len(statuses) == 8
    assert set(statuses.values()) == {"skipped"}
    assert all("--budget" in stage["reason"] for stage in result["stages"][1:])
    out = capsys.readouterr().out
    assert all(name in out for name in statuses)
    assert json.loads(out.splitlines()[-1])["cells"] == []


@pytest.fixture(scope="module")
def result(script: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of a toy run."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    result: dict[str, Any] = script("gpu.py", "--toy", "--out", file).result
    assert json.loads(file.read_text()) == result
    return result


@pytest.mark.slow
@pytest.mark.xdist_group("toy run")
def test_the_toy_run_measures_every_stage_and_ends_with_json(result: dict[str, Any]) -> None:
    statuses = statuses_of(result)
    assert set(statuses.values()) == {"done"}, result["stages"]
    assert len(statuses) == 9
    assert result["ceilings"]["copy_bytes_per_second"] > 1e8
    assert {(cell["shape"], cell["rows"], cell["agreement_wanted"]) for cell in result["cells"]} == {
        *(("toy Llama", rows, agreement) for rows in (1, 3) for agreement in (0.9, 0.7)),
        *(("toy Qwen3", 1, agreement) for agreement in (0.9, 0.7)),
    }


@pytest.mark.slow
@pytest.mark.xdist_group("toy run")
def test_the_figures_of_every_toy_cell_are_consistent(result: dict[str, Any]) -> None:
    for cell in result["cells"]:
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
        # A token takes a pass and the overhead of the loop; a busy machine is an imprecise clock.
        assert 0.1 < cell["plain_tokens_per_second"] * times.plain / cell["rows"] < 5
        assert 0.1 < cell["efficiency"] < 10


@pytest.mark.slow
@pytest.mark.xdist_group("toy run")
def test_the_limit_of_the_toy_run_follows_from_its_measured_bandwidth(result: dict[str, Any]) -> None:
    cell = next(cell for cell in result["cells"] if cell["rows"] == 3)
    context = 13 + TOY.new_tokens / 2
    bandwidth = result["ceilings"]["copy_bytes_per_second"]
    limit = bandwidth_limit(in_float32(TOY_LLAMA).build(CPU, 0), 3, context, bandwidth)
    assert cell["limit_tokens_per_second"] == pytest.approx(limit)
    assert cell["share_of_limit"] == pytest.approx(cell["plain_tokens_per_second"] / limit)


@pytest.mark.slow
@pytest.mark.xdist_group("toy run")
def test_the_toy_run_measures_the_peers_and_a_search(result: dict[str, Any]) -> None:
    peers, ours = result["peers"], result["cells"][0]["ours_tokens_per_second"]
    assert result["cells"][0]["agreement_wanted"] == FIRST_AGREEMENT
    assert set(peers["ours_over"]) == {"model.generate", "assistant_early_exit"}
    for name, speed in peers["tokens_per_second"].items():
        assert peers["ours_over"][name] == pytest.approx(ours / speed)
    assert peers["early_exit_agreement"] == pytest.approx(FIRST_AGREEMENT, abs=0.1)
    search = result["search"]
    assert search["trials_whole"] + search["trials_ended_early"] == TOY.search.trials
    assert search["seconds"] >= sum(search["phases_s"].values())


@pytest.mark.slow
@pytest.mark.xdist_group("trained")
def test_a_toy_training_learns_and_saves_a_complete_model(trained: dict[str, Any]) -> None:
    assert trained["held_out_loss"] < math.log(TOY_SIZE.vocabulary) - 0.3  # the loss of a uniform guess
    assert trained["tokens_seen"] == trained["steps"] * TOY_SIZE.rows * TOY_SIZE.length > 0
    files = {file.name for file in Path(trained["out"]).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "calibration.jsonl", "held_out.jsonl"} <= files


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_1(script: Any) -> None:
    ran = script("gpu.py", "--toy", "--device", "abacus")
    assert (ran.code, ran.out, ran.err) == (1, "", "error: device 'abacus' is unknown; give 'cuda' or 'cpu'\n")


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
def test_the_toy_run_works_on_cuda() -> None:
    result = gpu.main(["--toy", "--device", "cuda"])
    assert set(statuses_of(result).values()) == {"done"}, result["stages"]
