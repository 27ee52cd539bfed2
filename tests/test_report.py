from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from selfspec_search.pareto import pareto_front
from selfspec_search.report import ReportData, StudyData, Trial, canvas, make_page, read_source, write_report
from selfspec_search.report.figures import ideal_cost
from selfspec_search.report.page import comparison_rows, settings, tiles, verdict
from selfspec_search.report.panels import gains, panels
from selfspec_search.store import Store
from typer.testing import CliRunner, Result

from selfspec import Plan, SkipSet
from selfspec.cli import app
from selfspec.errors import InputError, PlanError
from selfspec.plan import PLAN_FILE, Conditions, Figures, ModelIdentity, Provenance

LAYERS = 5
LOOKUP = {"gamma": 7, "min_ngram": 2}
PLAN_OF_ONE = Plan(skip_set=SkipSet(attn={1}), gamma=2)
ALL_PANELS = ["skipped", "pareto", "history", "predicted-measured", "positions", "sensitivity"]
HOSTILE = "<script>alert('$x^{')</script>\"&"


@dataclass(frozen=True)
class Stored:
    number: int
    skip_set: SkipSet
    value: float | None
    record: Mapping[str, Any] = field(default_factory=dict)


def record(index: int, *, pruned: bool) -> dict[str, Any]:
    prediction = {
        "gamma": 3,
        "threshold": 0.375,
        "lookup": LOOKUP,
        "tokens_per_round": 2.125,
        "acceptance_rate": 0.625,
        "tokens_per_second": 211.5,
        "speedup": 1 + index / 10,
        "texts": 11,
    }
    first = {"estimate": 1 + index / 11, "draft_cost": 0.9 - index / 10, "agreement": 0.99 - index**2 / 100}
    return {**first, "seconds": 0.5, "worker": f"host-{index % 3}", **({} if pruned else {"prediction": prediction})}


def stored(index: int) -> Stored:
    """Every third one pruned; the best is number 5."""
    pruned = index % 3 == 1
    skip_set = SkipSet(attn=range(index % LAYERS), mlp=[index % LAYERS])
    return Stored(index, skip_set, None if pruned else 1 + index / 10, record(index, pruned=pruned))


def study(count: int = 7, **changes: Any) -> StudyData:
    trials = [Trial.of(stored(index)) for index in range(count)]
    identity = {"model": "tiny-llama", "gamma_max": 6, "sampling": {"top_k": 13}, "prompts": "0f1e2d"}
    matters = {(kind, layer): 0.9 + layer / 100 for kind in ("attn", "mlp") for layer in range(LAYERS)}
    data: dict[str, Any] = {"name": "night", "trials": trials, "num_layers": LAYERS, "identity": identity}
    return StudyData(**{**data, "sensitivity": matters, **changes})


class MoreFigures(Figures):
    """Figures as a plan of a whole search records them."""

    agreement: list[float] = Field(default=[])
    spread: list[float] = Field(default=[])


def figures(scale: float, texts: int, agreement: list[float] | None = None) -> Figures:
    return MoreFigures.model_construct(
        tokens_per_round=2.0 * scale,
        acceptance_rate=0.5 * scale,
        tokens_per_second=200.0 * scale,
        speedup=1.5 * scale,
        texts=texts,
        agreement=agreement or [],
    )


def plan(best: SkipSet | None = None, *, measured: bool = True, agreement: bool = True, layers: int = LAYERS) -> Plan:
    by_position = [0.9, 0.8, 0.7] if agreement else []
    provenance = Provenance.model_construct(
        conditions=Conditions(device="cpu", dtype="float32", versions={"torch": "2.13.0"}),
        seed=17,
        trials=7,
        predicted=figures(1.1, 11, by_position),
        predicted_on_held_out=figures(1.05, 3, by_position),
        measured=figures(1.0, 3, by_position) if measured else None,
        profile={},
    )
    made = Plan(
        skip_set=best if best is not None else study().best(1)[0].skip_set,
        gamma=3,
        model=ModelIdentity(model_type="llama", num_layers=layers, fingerprint="00ff"),
    )
    return made.model_copy(update={"provenance": provenance})


def plan_of_none() -> Plan:
    return plan().model_copy(update={"skip_set": SkipSet(), "gamma": 0})


def rich() -> ReportData:
    return ReportData(source="plan.json", plan=plan(), study=study())


@cache
def rich_html() -> str:
    return make_page(rich()).html


def panels_of(html: str) -> list[str]:
    return [key for key in re.findall(r'<section id="([^"]*)">', html) if key in ALL_PANELS]


def drawn(data: ReportData) -> list[str]:
    with canvas.style():
        return [panel.key for panel in panels(data)]


class Checker(HTMLParser):
    """Collects what a browser would fetch or run, and finds tags that are not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
                self.fetched.append(value or "")
            assert not name.startswith("on")
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)


# --- the Pareto front ---

POINTS = st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])] * 2), max_size=11)


def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] >= b[1] and a != b


@given(points=POINTS)
def test_a_point_is_on_the_front_exactly_if_no_point_dominates_it(points: list[tuple[float, float]]) -> None:
    expected = [i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)]
    assert sorted(pareto_front(points)) == expected


@given(points=POINTS)
def test_the_front_rises_in_cost_and_agreement(points: list[tuple[float, float]]) -> None:
    front = [points[index] for index in pareto_front(points)]
    assert all(a == b or (a[0] < b[0] and a[1] < b[1]) for a, b in pairwise(front))


def test_a_lone_point_and_equal_points_are_all_on_the_front_in_the_order_given() -> None:
    assert pareto_front([]) == []
    assert pareto_front([(0.5, 0.5), (0.5, 0.5), (0.5, 0.4), (0.6, 0.5)]) == [0, 1]


@pytest.mark.parametrize(("agreement", "cost", "speedup"), [(0.9, 0.55, 1.30), (0.9, 0.28, 1.95), (0.9, 0.10, 3.43)])
def test_lines_of_equal_speedup_pass_where_the_idealised_model_puts_them(
    agreement: float, cost: float, speedup: float
) -> None:
    assert ideal_cost(agreement, speedup, gamma_max=20) == pytest.approx(cost, abs=0.01)


# --- the page ---


def test_a_rich_study_with_its_plan_has_every_panel_in_order_and_a_png_of_each() -> None:
    page = make_page(rich(), pngs=True)
    assert panels_of(page.html) == ALL_PANELS
    assert sorted(page.pngs) == sorted(f"{key}.png" for key in ALL_PANELS)
    assert all(data.startswith(b"\x89PNG") for data in page.pngs.values())
    assert page.html.count("<svg") == len(ALL_PANELS)


def test_the_page_fetches_nothing_runs_nothing_and_closes_every_tag() -> None:
    html = rich_html()
    checker = Checker(html)
    assert checker.open == []
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in checker.fetched)
    assert checker.tags & {"script", "iframe", "link", "object", "img"} == set()
    namespaces = re.findall(r'xmlns(?::\w+)?="(http[^"]*)"', html)
    assert re.findall(r'https?://[^"\s<)]+', html) == namespaces
    assert not re.search(r"url\((?!#)", html)


def test_the_same_data_makes_the_same_page() -> None:
    assert make_page(rich()).html == rich_html()


def test_hostile_names_are_shown_and_never_run() -> None:
    trials = [replace(trial, worker=HOSTILE, lookup=HOSTILE) for trial in study().trials]
    hostile = study(name=HOSTILE, trials=trials, identity={"model": HOSTILE, HOSTILE: [{HOSTILE: HOSTILE}]})
    html = make_page(ReportData(source=HOSTILE, plan=plan(), study=hostile)).html
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#39;$x^{&#39;)&lt;/script&gt;&#34;&amp;" in html
    assert Checker(html).open == []


def test_names_of_files_that_are_not_unicode_do_not_stop_the_page(tmp_path: Path) -> None:
    data = ReportData(source=os.fsdecode(b"caf\xe9.json"), plan=PLAN_OF_ONE)
    (written,) = write_report(data, tmp_path / "page.html")
    assert "caf?.json" in written.read_text("utf8")


def test_every_figure_of_the_headline_says_whether_it_was_measured() -> None:
    assert [(tile.value, tile.source) for tile in tiles(rich())] == [
        ("1.50x", "measured"),
        ("1.58x", "predicted"),
        ("2.00", "measured"),
        ("50.0%", "measured"),
        ("200", "measured"),
    ]


def test_a_plan_that_was_not_confirmed_shows_predictions_only() -> None:
    data = ReportData(source="plan.json", plan=plan(measured=False))
    assert {tile.source for tile in tiles(data)} == {"predicted"}
    assert "Nothing was measured" in make_page(data).html
    assert comparison_rows(data)["speedup"] == ["1.65x", "1.58x"]


def test_errors_are_measured_over_predicted_less_one() -> None:
    rows = comparison_rows(rich())
    assert rows["speedup"] == ["1.65x", "1.58x", "1.50x", "-9.1%", "-4.8%"]
    assert rows["prompts"] == ["11", "3", "3", "", ""]
    assert {len(cells) for cells in rows.values()} == {5}


def test_the_spread_over_prompts_has_a_row_where_it_was_recorded() -> None:
    known = plan()
    assert known.provenance is not None
    assert known.provenance.measured is not None
    measured = known.provenance.measured.model_copy(update={"spread": [1.5, 2.0, 2.75]})
    provenance = known.provenance.model_copy(update={"measured": measured})
    data = ReportData(source="p", plan=known.model_copy(update={"provenance": provenance}))
    (row,) = (cells for name, cells in comparison_rows(data).items() if "by prompt" in name)
    assert row == ["\u2014", "\u2014", "1.50, 2.00, 2.75", "", ""]
    assert not any("by prompt" in name for name in comparison_rows(rich()))


def test_a_plan_that_does_not_speculate_says_so_and_compares_nothing() -> None:
    data = ReportData(source="plan.json", plan=plan_of_none(), study=study())
    html = make_page(data).html
    assert verdict(data).startswith("Do not speculate")
    assert verdict(data).split(":")[0] in html
    assert panels_of(html) == ["pareto", "history", "sensitivity"]
    assert "runs no layer-skipping draft" in html
    assert [(tile.value, tile.source) for tile in tiles(data)] == [("200", "measured"), ("1.60x", "predicted")]


def test_acceptance_by_position_appears_only_where_it_was_recorded() -> None:
    assert "positions" in drawn(ReportData(source="p", plan=plan()))
    assert "positions" not in drawn(ReportData(source="p", plan=plan(agreement=False)))


def test_the_caption_names_only_the_lines_that_are_drawn() -> None:
    known = plan()
    assert known.provenance is not None
    measured_only = known.provenance.model_copy(update={"predicted": None, "predicted_on_held_out": None})
    captions = {}
    for made in (known, known.model_copy(update={"provenance": measured_only}), plan(measured=False)):
        with canvas.style():
            (panel,) = (p for p in panels(ReportData(source="p", plan=made)) if p.key == "positions")
        captions["measured" in panel.caption, "predicted" in panel.caption] = panel.caption
    assert set(captions) == {(True, True), (True, False), (False, True)}


def test_lookup_is_told_in_words_where_it_is_one() -> None:
    told = [
        Trial.of(Stored(0, SkipSet(), 1.0, {"prediction": {"lookup": given}})).lookup for given in (LOOKUP, {"x": 1})
    ]
    assert told == ["2 to 8 tokens, drafts 7", "x 1"]


def test_a_bare_plan_shows_what_it_skips_and_nothing_that_it_does_not_know() -> None:
    data = ReportData(source="plan.json", plan=Plan(skip_set=SkipSet(attn={1, 2}), gamma=2))
    page = make_page(data)
    assert panels_of(page.html) == ["skipped"]
    assert "skips 2 of 3 attention" in page.html
    assert tiles(data) == []


def test_a_study_without_a_plan_shows_its_best_trial_as_predicted() -> None:
    data = ReportData(source="study.db", study=study())
    assert verdict(data).startswith("Best of 7 trials: skip attn 0 | mlp 1; gamma 3, exit below 0.375; lookup first")
    assert {tile.source for tile in tiles(data)} == {"predicted"}
    assert drawn(data) == ["skipped", "pareto", "history", "sensitivity"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_study_of_one_trial_or_none_is_still_a_page(count: int) -> None:
    data = ReportData(source="study.db", study=study(count, sensitivity={}))
    expected = ["skipped", "pareto", "history"] if count else []
    assert panels_of(make_page(data).html) == expected


def test_a_study_whose_trials_all_ended_early_says_that_there_is_nothing_to_choose() -> None:
    pruned = [replace(trial, speedup=None) for trial in study().trials]
    data = ReportData(source="study.db", study=study(trials=pruned))
    html = make_page(data).html
    assert verdict(data) == "No trial was whole, so there is nothing to choose from yet."
    assert verdict(data) in html
    assert panels_of(html) == ["pareto", "history", "sensitivity"]
    assert 'id="best"' not in html


def test_records_that_are_not_what_they_should_be_are_left_out() -> None:
    odd = {"estimate": "fast", "draft_cost": float("nan"), "agreement": True, "prediction": [1], "worker": 7}
    trial = Trial.of(Stored(0, SkipSet(), float("inf"), odd))
    assert (trial.speedup, trial.estimate, trial.point, trial.gamma, trial.worker) == (None, None, None, None, "7")
    assert drawn(ReportData(source="s", study=study(trials=[trial], sensitivity={}))) == []


def test_trials_that_were_refused_unreplayed_do_not_stand_at_zero_in_the_history() -> None:
    refused = Trial.of(Stored(0, SkipSet(), None, {"estimate": 0.0, "draft_cost": 0.9}))
    assert refused.speedup_or_estimate is None
    assert gains([refused, replace(refused, skip_set=SkipSet(attn={0}))], num_layers=1) == {}


def test_a_deep_model_still_fits() -> None:
    deep = [Trial.of(Stored(0, SkipSet(attn=range(40, 80)), 1.25, record(1, pruned=False)))]
    html = make_page(
        ReportData(source="s", study=study(trials=deep, num_layers=80, sensitivity={("mlp", 79): 0.5}))
    ).html
    assert panels_of(html) == ["skipped", "pareto", "history", "sensitivity"]


def test_without_recorded_sensitivity_it_comes_from_the_trials_and_says_so() -> None:
    html = make_page(ReportData(source="s", study=study(sensitivity={}))).html
    assert "is no experiment on each sub-layer" in html
    assert "is no experiment on each sub-layer" not in rich_html()


def test_gains_are_mean_speedups_with_a_sublayer_skipped_less_those_with_it_run() -> None:
    made = {SkipSet(attn={0}): 1.5, SkipSet(attn={0}, mlp={1}): 1.3, SkipSet(mlp={1}): 1.0, SkipSet(): 1.0}
    trials = [Trial(number=i, skip_set=s, speedup=v) for i, (s, v) in enumerate(made.items())]
    found = gains(trials, num_layers=2)
    assert found == {("attn", 0): pytest.approx(0.4), ("mlp", 1): pytest.approx(-0.1)}


def test_the_best_trials_are_ten_different_sets_the_smaller_draft_first_among_equals() -> None:
    values = [(SkipSet(attn=range(i % 13)), 1 + (i // 2) / 100) for i in range(26)]
    ranked = study(trials=[Trial(number=i, skip_set=s, speedup=v) for i, (s, v) in enumerate(values)], num_layers=13)
    best = ranked.best(10)
    assert len({trial.skip_set for trial in best}) == 10
    assert [trial.number for trial in best[:3]] == [25, 24, 23]
    assert [trial.speedup for trial in best] == sorted((t.speedup or 0 for t in best), reverse=True)


def test_settings_and_versions_are_all_there() -> None:
    groups = settings(rich())
    assert groups["model"]["fingerprint"] == "00ff"
    assert (groups["search"]["torch"], groups["search"]["seed"]) == ("2.13.0", "17")
    assert groups["study"]["sampling"] == "top_k 13"
    assert groups["study"]["workers"] == "host-0, host-1, host-2"
    html = rich_html()
    assert all(value in html for group in groups.values() for value in group.values())


@pytest.mark.parametrize(("recorded", "said"), [("night", True), ("day", False), (None, False)])
def test_a_plan_is_said_to_have_won_only_in_the_study_that_it_came_of(recorded: str | None, said: bool) -> None:
    known = plan()
    assert known.provenance is not None
    made = known.model_copy(update={"provenance": known.provenance.model_copy(update={"study": recorded})})
    html = make_page(ReportData(source="p", plan=made, study=study())).html
    assert ("decoded fastest on held-out prompts" in html) is said


def test_a_plan_of_another_model_than_the_study_is_refused() -> None:
    with pytest.raises(InputError, match="for a model of 7 layers, but study 'night' searched one of 5"):
        ReportData(source="s", plan=plan(layers=7), study=study())


# --- files and storages ---


def fill(storage: Path, name: str = "night", count: int = 5) -> Path:
    with Store.open(str(storage), name, {"model": "tiny-llama"}, num_layers=LAYERS) as store:
        store.share(lambda: {"sensitivity": json.dumps({"attn_3": 0.75, "mlp_0": 0.5, "other": 1}).encode()})
        for index in range(count):
            trial = stored(index)
            with store.begin(trial.skip_set) as running:
                if trial.value is None:
                    running.prune(trial.record["estimate"], trial.record)
                else:
                    running.finish(trial.value, trial.record)
    return storage


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("storage") / "study.db")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *(str(argument) for argument in arguments)])


def complaint(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("error: ").strip()


@pytest.mark.parametrize("scheme", ["", "sqlite:///"])
def test_a_study_is_read_from_a_file_and_from_a_url(storage: Path, scheme: str) -> None:
    read = read_source(f"{scheme}{storage}").study
    assert read is not None
    assert (read.name, read.num_layers, read.identity["model"]) == ("night", LAYERS, "tiny-llama")
    assert [trial.skip_set for trial in read.trials] == [stored(index).skip_set for index in range(5)]
    assert [trial.speedup for trial in read.trials] == [stored(index).value for index in range(5)]
    assert read.sensitivity == {("attn", 3): 0.75, ("mlp", 0): 0.5}


def test_a_study_is_read_from_a_journal(tmp_path: Path) -> None:
    assert read_source(str(fill(tmp_path / "study.journal"))).study is not None


def test_the_command_writes_the_page_beside_the_storage_and_the_figures_where_told(
    storage: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "my study.db"
    copied.write_bytes(storage.read_bytes())
    result = run(copied, "--png", tmp_path / "a" / "b")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "my study_report.html").read_text("utf8").startswith("<!DOCTYPE html>")
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} >= {"pareto.png", "history.png"}


def test_a_plan_is_reported_with_the_study_that_lies_beside_it(storage: Path, tmp_path: Path) -> None:
    saved = Plan(skip_set=stored(3).skip_set, gamma=2).save(tmp_path / "plan.json")
    assert read_source(str(saved)).study is None
    (tmp_path / "plan.db").write_bytes(storage.read_bytes())
    chosen = read_source(str(saved)).chosen_trial
    assert chosen is not None
    assert chosen.skip_set == stored(3).skip_set


def test_a_directory_that_holds_a_plan_is_reported_into_it(tmp_path: Path) -> None:
    Plan(skip_set=SkipSet(attn={1}), gamma=2).save(tmp_path / PLAN_FILE)
    assert run(tmp_path).exit_code == 0
    assert (tmp_path / "selfspec_plan_report.html").is_file()


def test_a_study_is_reported_with_a_plan_that_is_named(storage: Path, tmp_path: Path) -> None:
    chosen = Plan(skip_set=stored(2).skip_set, gamma=2).save(tmp_path / "other.json")
    out = tmp_path / "page.html"
    assert run(storage, "--plan", chosen, "--out", out).exit_code == 0
    assert "The ring marks the chosen plan" in out.read_text("utf8")


def test_passwords_in_urls_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from selfspec_search.report import sources

    monkeypatch.setattr(sources, "_read_study", lambda storage, name: study())
    html = make_page(read_source("postgresql://me:secret@host/trials")).html
    assert "postgresql://me:***@host/trials" in html
    assert "secret" not in html


def test_a_storage_of_several_studies_asks_which(tmp_path: Path) -> None:
    both = fill(fill(tmp_path / "both.db", "night", 1), "day", 2)
    said = complaint(both)
    assert "'night'" in said
    assert "'day'" in said
    assert "--study" in said
    assert run(both, "--study", "day").exit_code == 0
    assert "evening" in complaint(both, "--study", "evening")


def test_what_is_neither_a_plan_nor_a_storage_takes_one_line(tmp_path: Path) -> None:
    text, empty, broken = tmp_path / "notes.txt", tmp_path / "empty", tmp_path / "broken.db"
    text.write_text("hello")
    empty.touch()
    broken.write_bytes(b"SQLite format 3\x00" + b"\xff" * 100)
    assert "neither a plan (JSON) nor a study's storage" in complaint(text)
    assert "neither a plan (JSON) nor a study's storage" in complaint(empty)
    assert str(broken) in complaint(broken)
    assert "there is no file" in complaint(tmp_path / "gone.json")
    assert PLAN_FILE in complaint(tmp_path)
    assert not list(tmp_path.glob("*.html"))


def test_a_storage_without_studies_of_ours_takes_one_line(tmp_path: Path) -> None:
    import optuna

    optuna.create_study(storage=f"sqlite:///{tmp_path}/alien.db", study_name="alien")
    assert "holds no study" in complaint(tmp_path / "alien.db")


def test_options_that_cannot_be_meant_take_one_line(storage: Path, tmp_path: Path) -> None:
    saved = PLAN_OF_ONE.save(tmp_path / "plan.json")
    assert "one too many" in complaint(saved, "--plan", saved)
    assert "no storage" in complaint(saved, "--study", "night")
    assert "no plan at" in complaint(storage, "--plan", tmp_path / "gone.json", "--out", tmp_path / "x.html")


def test_pages_and_figures_that_cannot_be_written_take_one_line(tmp_path: Path) -> None:
    saved = PLAN_OF_ONE.save(tmp_path / "plan.json")
    assert "there is no directory" in complaint(saved, "--out", tmp_path / "gone" / "page.html")
    assert "cannot write figures" in complaint(saved, "--png", saved)
    with pytest.raises(PlanError, match="cannot write"):
        write_report(ReportData(source="p", plan=PLAN_OF_ONE), tmp_path / "gone" / "page.html")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_is_not_writable_is_found_out_before_anything_is_read(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "not writable" in complaint("postgresql://nowhere/x", "--out", tmp_path / "page.html")
