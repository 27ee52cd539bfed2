"""Metrics for dashboards equal figures that were counted by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import complaint, run
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from saved import PLAN, save_model

from selfspec import InputError, Metrics, SelfspecError, Stats
from selfspec.decoding.acceptance import Committed
from selfspec.serving.metrics import to_text

PER_POS = "selfspec_spec_decode_num_{}_tokens_per_pos_total"
BY_ORIGIN = "selfspec_spec_decode_num_{}_tokens_by_origin_total"


def first() -> Stats:
    """Two rows and three rounds: 2 of 3 tokens accepted, 2 of 2 accepted, nothing drafted."""
    stats = Stats(rows=2)
    stats.count_pass([Committed(0, 7, [1, 2, 9], 3, 2, "layers"), Committed(1, 7, [4, 5, 6], 2, 2, "lookup")])
    stats.count_pass([Committed(0, 10, [5], 0, 0, "layers")])
    stats.count_choice("lookup 2, else layers 3", 3, 4)
    stats.count_choice("lookup 2", 0, 1)
    stats.seconds |= {"prefill": 0.5, "draft": 1.0, "verify": 2.0, "total": 3.75}
    return stats


def second() -> Stats:
    """One row and one round: 4 of 5 tokens accepted, a longer draft than any draft of `first`."""
    stats = Stats(rows=1)
    stats.count_pass([Committed(0, 3, [1, 2, 3, 4, 9], 5, 4, "layers")])
    stats.count_choice("layers 5", 5, 6)
    stats.seconds |= {"prefill": 0.25, "draft": 0.5, "verify": 0.25, "total": 1.25}
    return stats


def read(text: str, **labels: str) -> dict[tuple[str, str], float]:
    """Samples that have all of `labels`, by name and by the value of the metric's own label."""
    return {
        (sample.name, "".join(value for name, value in sample.labels.items() if name not in labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if labels.items() <= sample.labels.items()
    }


def scraped(registry: CollectorRegistry, **labels: str) -> dict[tuple[str, str], float]:
    samples = read(generate_latest(registry).decode(), **labels)
    return {key: value for key, value in samples.items() if not key[0].endswith("_created")}  # the counters' ages


FIRST = {
    ("selfspec_rows_total", ""): 2,
    ("selfspec_generation_tokens_total", ""): 7,
    ("selfspec_rounds_total", ""): 3,
    ("selfspec_spec_decode_num_drafts_total", ""): 2,
    ("selfspec_spec_decode_num_draft_tokens_total", ""): 5,
    ("selfspec_spec_decode_num_accepted_tokens_total", ""): 4,
    **{(PER_POS.format("accepted"), str(position)): count for position, count in enumerate([2, 2, 0])},
    **{(PER_POS.format("reached"), str(position)): count for position, count in enumerate([2, 2, 1])},
    (BY_ORIGIN.format("draft"), "layers"): 3,
    (BY_ORIGIN.format("draft"), "lookup"): 2,
    (BY_ORIGIN.format("accepted"), "layers"): 2,
    (BY_ORIGIN.format("accepted"), "lookup"): 2,
    ("selfspec_verify_passes_total", ""): 2,
    ("selfspec_draft_passes_total", ""): 3,
    ("selfspec_choice_passes_total", "lookup 2, else layers 3"): 1,
    ("selfspec_choice_passes_total", "lookup 2"): 1,
    ("selfspec_phase_seconds_total", "prefill"): 0.5,
    ("selfspec_phase_seconds_total", "draft"): 1.0,
    ("selfspec_phase_seconds_total", "verify"): 2.0,
    ("selfspec_phase_seconds_total", "other"): 0.25,
    ("selfspec_tokens_per_second", ""): 7 / 3.75,
    ("selfspec_tokens_per_round", ""): 7 / 3,
    ("selfspec_spec_decode_draft_acceptance_rate", ""): 4 / 5,
    ("selfspec_draft_bytes", ""): 0,
    ("selfspec_graph_bytes", ""): 0,
}


def test_the_text_and_the_metrics_of_one_call_equal_the_hand_count() -> None:
    registry = CollectorRegistry()
    Metrics(registry).observe(first())
    assert read(to_text(first())) == scraped(registry) == FIRST


def test_counters_sum_over_requests_and_gauges_show_the_latest_request() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.observe(first())
    before = scraped(registry)
    metrics.observe(second())
    after = scraped(registry)
    counters = [key for key in before if key[0].endswith("_total")]
    assert len(counters) == len(FIRST) - 5
    assert all(after[key] >= before[key] for key in counters)
    assert after["selfspec_generation_tokens_total", ""] == 7 + 5
    assert after["selfspec_spec_decode_num_accepted_tokens_total", ""] == 4 + 4
    assert [after[PER_POS.format("accepted"), str(position)] for position in range(5)] == [3, 3, 1, 1, 0]
    assert [after[PER_POS.format("reached"), str(position)] for position in range(5)] == [3, 3, 2, 1, 1]
    assert after[BY_ORIGIN.format("accepted"), "layers"] == 2 + 4
    assert after["selfspec_phase_seconds_total", "other"] == 0.25 + 0.25
    assert after["selfspec_tokens_per_second", ""] == 5 / 1.25
    assert after["selfspec_spec_decode_draft_acceptance_rate", ""] == 4 / 5


def test_labels_separate_the_models_of_one_process() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, labels=["model", "site"])
    metrics.observe(first(), model="large", site="here")
    for _ in range(2):
        metrics.observe(second(), site="here", model="small")
    assert scraped(registry, model="large", site="here") == FIRST
    assert scraped(registry, model="small", site="here")["selfspec_generation_tokens_total", ""] == 10


def test_a_device_clock_ahead_of_the_host_clock_decreases_no_counter() -> None:
    stats = first()
    stats.seconds["total"] = 3.0
    assert stats.other_seconds == -0.5
    registry = CollectorRegistry()
    Metrics(registry).observe(stats)
    assert scraped(registry)["selfspec_phase_seconds_total", "other"] == 0


def test_without_a_draft_the_acceptance_rate_is_nan_in_metrics_and_0_in_json() -> None:
    stats = Stats(rows=1)
    stats.count_pass([Committed(0, 3, [8], 0, 0, "layers")])
    samples = read(to_text(stats))
    assert math.isnan(samples["selfspec_spec_decode_draft_acceptance_rate", ""])
    assert samples["selfspec_spec_decode_num_drafts_total", ""] == 0
    assert json.loads(stats.to_json(), parse_constant=pytest.fail)["acceptance_rate"] == 0


def test_stats_become_one_json_object() -> None:
    data = json.loads(first().to_json(), parse_constant=pytest.fail)
    assert (data["drafted"], data["accepted"], data["accepted_at"]) == (5, 4, [2, 2, 0])
    assert data == json.loads(json.dumps(first().to_dict()))
    assert "\n" not in first().to_json()


def test_stats_of_two_calls_add_up() -> None:
    total, one, other = Stats(), first(), second()
    one.slower_paths, other.slower_paths, other.backend = ["slow"], ["slow", "slower"], "sdpa"
    other.draft_bytes = one.draft_bytes = 17
    total.add(one)
    total.add(other)
    assert (total.rows, total.tokens, total.rounds, total.drafted, total.accepted) == (3, 12, 4, 10, 8)
    assert (total.reached_at, total.accepted_at) == ([3, 3, 2, 1, 1], [3, 3, 1, 1, 0])
    assert total.by_origin == {"layers": [8, 6], "lookup": [2, 2]}
    assert total.choices == {"lookup 2, else layers 3": 1, "lookup 2": 1, "layers 5": 1}
    assert total.seconds == {"prefill": 0.75, "draft": 1.5, "verify": 2.25, "total": 5.0}
    assert total.tokens_per_second == 12 / 5
    assert total.history == one.history + other.history
    assert (total.slower_paths, total.backend, total.draft_bytes) == (["slow", "slower"], "sdpa", 17)
    assert one.reached_at == [2, 2, 1]  # add() leaves its argument unchanged


# --- Refusals ---


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("model", "labels is 'model', so every letter would be a label; give a list of different names, such as"),
        (["model", 7], "labels holds 7, but names are strings; give a list"),
        ([["model"]], r"labels holds \['model'\], but names are strings"),
        (["position"], "'position' is one of the metrics' own"),
        (["__x"], "__x"),
        (["model", "site", "model"], "labels holds 'model' twice; give a list of different names"),
    ],
)
def test_bad_labels_are_refused_in_one_line_and_nothing_is_registered(labels: Any, message: str) -> None:
    registry = CollectorRegistry()
    with pytest.raises(InputError, match=message) as caught:
        Metrics(registry, labels=labels)
    assert "\n" not in str(caught.value)
    Metrics(registry, labels=iter(["model"])).observe(first(), model="m")


def test_a_registry_accepts_one_set_of_metrics() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    with pytest.raises(InputError, match="make one Metrics per registry"):
        Metrics(registry)


@pytest.mark.parametrize("given", [{}, {"site": "x"}, {"model": "m", "site": "x"}])
def test_observe_needs_a_value_for_each_label_and_refuses_other_labels(given: dict[str, str]) -> None:
    metrics = Metrics(CollectorRegistry(), labels=["model"])
    with pytest.raises(InputError, match="labels of these metrics: model"):
        metrics.observe(first(), **given)


def test_without_prometheus_client_the_error_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)  # as if the package were not installed
    for use in (lambda: to_text(first()), Metrics):
        with pytest.raises(SelfspecError, match=r"pip install 'selfspec\[metrics\]'"):
            use()
    assert json.loads(first().to_json())["tokens"] == 7


# --- generate --stats ---


def test_generate_writes_the_figures_of_all_prompts_to_a_file(tmp_path: Path) -> None:
    model, out, prompts = save_model(tmp_path / "model"), tmp_path / "figures.json", tmp_path / "prompts.txt"
    prompts.write_text("one\nand another\n")
    plan = PLAN.save(tmp_path / "plan.json")
    command = ("generate", model, "--plan", plan, "--prompt-file", prompts, "--max-new-tokens", 13)
    result = run(*command, "--stats", out)
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert (data["rows"], data["tokens"]) == (2, 26)
    drafted = [line.split(" of ")[1].split()[0] for line in result.stderr.splitlines()]
    assert len(drafted) == 2
    assert data["drafted"] == sum(map(int, drafted))
    assert result.stdout == run(*command).stdout


def test_an_unwritable_stats_file_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    command = ("generate", "no-model", "--plan", "no-plan", "--prompt", "x", "--stats")
    assert "there is no directory" in complaint(*command, tmp_path / "none" / "x.json")
    assert "it is a directory" in complaint(*command, tmp_path)
    assert "stdout is for the text" in complaint(*command, "-")
    assert "stdout is for the text" in complaint(*command, "/dev/stdout")
