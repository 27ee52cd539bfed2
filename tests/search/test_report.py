from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import commands
import optuna
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from models import ENDS_SKIPPED, VOCABULARY, damped_model
from models import LAYERS as TINY_LAYERS
from optuna.trial import TrialState
from selfspec_search import SearchSettings, load_study, search
from selfspec_search.report import ReportData, StudyData, Trial, canvas, make_page, read_source, write_report
from selfspec_search.report.data import pareto_front
from selfspec_search.report.figures import ideal_cost
from selfspec_search.report.headline import tiles, title, verdict
from selfspec_search.report.panels import Panel, gains, panels
from selfspec_search.report.tables import INTERVAL, SPREAD, comparison_rows, settings
from selfspec_search.storage.study_store import Store, StoredTrial

from selfspec import Plan, SkipSet
from selfspec.errors import InputError
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.lookup import PromptLookup
from selfspec.plan.plan import PLAN_FILE
from selfspec.plan.provenance import Conditions, Figures, ModelIdentity, Provenance

LAYERS = 5
LOOKUP = {"gamma": 7, "min_ngram": 2}
PLAN_OF_ONE = Plan(skip_set=SkipSet(attn={1}), gamma=2)
ALL_PANELS = ["skipped", "pareto", "history", "predicted-measured", "positions", "sensitivity"]
DIGIT = 7
"""Pixels, in a figure's usual resolution."""
HOSTILE = "<script>alert('$x^{')</script>\"&"


def trial(value: float | None, record: Mapping[str, Any]) -> Trial:
    return Trial.of(StoredTrial(number=0, draft_spec=DraftSpec(), value=value, record=record))


def record(index: int, *, pruned: bool) -> dict[str, Any]:
    prediction = {
        "gamma": 3,
        "lookup": LOOKUP,
        "tokens_per_round": 2.125,
        "acceptance_rate": 0.625,
        "tokens_per_second": 211.5,
        "speedup": 1 + index / 10,
        "texts": 11,
    }
    first = {"estimate": 1 + index / 11, "draft_cost": 0.9 - index / 10, "agreement": 0.99 - index**2 / 100}
    return {**first, "seconds": 0.5, "worker": f"host-{index % 3}", **({} if pruned else {"prediction": prediction})}


def stored(index: int) -> StoredTrial:
    """Every third trial is pruned; the best trial of seven is number 6."""
    pruned = index % 3 == 1
    skip_set = SkipSet(attn=range(index % LAYERS), mlp=[index % LAYERS])
    value, noted = None if pruned else 1 + index / 10, record(index, pruned=pruned)
    return StoredTrial(number=index, draft_spec=DraftSpec.of(skip_set), value=value, record=noted)


def study(count: int = 7, **changes: Any) -> StudyData:
    trials = [Trial.of(stored(index)) for index in range(count)]
    identity = {"model": "tiny-llama", "gamma_max": 6, "sampling": {"top_k": 13}, "prompts": "0f1e2d"}
    matters = {(kind, layer): 0.9 + layer / 100 for kind in ("attn", "mlp") for layer in range(LAYERS)}
    data: dict[str, Any] = {"name": "night", "trials": trials, "num_layers": LAYERS, "identity": identity}
    return StudyData(**{**data, "sensitivity": matters, **changes})


def figures(scale: float, texts: int, agreement: Sequence[float], **of_measuring: Any) -> Figures:
    speeds = {"tokens_per_round": 2.0, "acceptance_rate": 0.5, "tokens_per_second": 200.0, "speedup": 1.5}
    scaled = {name: value * scale for name, value in speeds.items()}
    return Figures(**scaled, texts=texts, agreement=list(agreement), **of_measuring)


def plan(
    best: SkipSet | None = None,
    *,
    agreement: Sequence[float] = (0.9, 0.8, 0.7),
    layers: int = LAYERS,
    **of_provenance: Any,
) -> Plan:
    found: dict[str, Any] = {
        "conditions": Conditions(device="cpu", dtype="float32", versions={"torch": "2.13.0"}),
        "predicted": figures(1.1, 11, agreement),
        "predicted_on_held_out": figures(1.05, 3, agreement),
        "measured": figures(1.0, 3, agreement, interval=[1.25, 1.75], spread=[1.5, 2.0, 2.75]),
    }
    return Plan(
        skip_set=best if best is not None else study().best(1)[0].skip_set,
        gamma=3,
        model=ModelIdentity(model_type="llama", num_layers=layers, fingerprint="00ff"),
        provenance=Provenance(seed=17, trials=7, **{**found, **of_provenance}),
    )


def rich() -> ReportData:
    """A study with its plan, and all that either can hold."""
    return ReportData(source="plan.json", plan=plan(), study=study())


@cache
def rich_html() -> str:
    return make_page(rich()).html


def panels_of(html: str) -> list[str]:
    return [key for key in re.findall(r'<section id="([^"]*)">', html) if key in ALL_PANELS]


def made(data: ReportData) -> dict[str, Panel]:
    with canvas.style():
        return {panel.key: panel for panel in panels(data)}


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
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# --- the Pareto front ---

POINTS = st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])] * 2), max_size=11)


def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] >= b[1] and a != b


@given(points=POINTS)
@example(points=[])
@example(points=[(0.5, 0.5), (0.5, 0.5), (0.5, 0.4), (0.6, 0.5)])
def test_the_front_holds_by_cost_all_points_that_no_point_dominates(points: list[tuple[float, float]]) -> None:
    expected = [i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)]
    assert pareto_front(points) == sorted(expected, key=lambda index: points[index][0])


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


def test_a_file_name_that_is_not_unicode_does_not_stop_the_page(tmp_path: Path) -> None:
    data = ReportData(source=os.fsdecode(b"caf\xe9.json"), plan=PLAN_OF_ONE)
    (written,) = write_report(data, tmp_path / "page.html")
    assert "caf?.json" in written.read_text("utf8")


def test_every_figure_of_the_headline_says_whether_it_was_measured_and_the_speedup_how_reliably() -> None:
    measured, *others = tiles(rich())
    assert (measured.sure, measured.on) == ("95 % interval 1.25x\u00a0to\u00a01.75x", "3 held-out prompts")
    assert {(tile.sure, tile.on) for tile in others} == {("", "")}
    assert measured.sure in rich_html()
    assert "measured on 3 held\u2011out prompts" in rich_html()
    assert [(tile.value, tile.source) for tile in tiles(rich())] == [
        ("1.50x", "measured"),
        ("1.58x", "predicted"),
        ("2.00", "measured"),
        ("50.0%", "measured"),
        ("200", "measured"),
    ]


def test_a_plan_that_was_not_confirmed_shows_predictions_only() -> None:
    data = ReportData(source="plan.json", plan=plan(measured=None))
    assert {tile.source for tile in tiles(data)} == {"predicted"}
    assert "Nothing was measured" in make_page(data).html
    rows = comparison_rows(data)
    assert rows["speedup"] == ["1.65x", "1.58x"]
    assert {INTERVAL, SPREAD} & set(rows) == set()


def test_the_table_compares_the_sources_and_errors_are_measured_over_predicted_less_one() -> None:
    rows = comparison_rows(rich())
    assert rows["speedup"] == ["1.65x", "1.58x", "1.50x", "-9.1%", "-4.8%"]
    assert rows["prompts"] == ["11", "3", "3", "", ""]
    assert rows[INTERVAL] == ["\u2014", "\u2014", "1.25x\u00a0to\u00a01.75x", "", ""]
    assert rows[SPREAD] == ["\u2014", "\u2014", "1.50, 2.00, 2.75", "", ""]
    assert {len(cells) for cells in rows.values()} == {5}
    errors = {"speedup": -0.031, "tokens_per_round": 0.0, "drafted": 0.2}
    rows = comparison_rows(ReportData(source="p", plan=plan(errors=errors)))
    assert [rows[name][-1] for name in ("", "speedup", "tokens per round")] == ["error, same prompts", "-3.1%", "+0.0%"]
    assert {len(cells) for cells in rows.values()} == {6}


def test_a_plan_that_does_not_speculate_says_so_and_compares_nothing() -> None:
    plain = plan().model_copy(update={"skip_set": SkipSet(), "gamma": 0})
    data = ReportData(source="plan.json", plan=plain, study=study())
    html = make_page(data).html
    assert verdict(data).startswith("Do not speculate")
    assert verdict(data).split(":")[0] in html
    assert panels_of(html) == ["pareto", "history", "sensitivity"]
    assert "runs no layer-skipping draft" in html
    shown = [(tile.value, tile.source, tile.on) for tile in tiles(data)]
    assert shown == [("200", "measured", "3 held-out prompts"), ("1.60x", "predicted", "")]


def positions_of(
    gamma: int, lookup: int | None, agreement: Sequence[float] = (0.9, 0.8, 0.7, 1.0, 1.0)
) -> tuple[Panel, list[list[Line2D]]]:
    """The panel of acceptance by position, and the lines of its two axes."""
    looking = None if lookup is None else PromptLookup(gamma=lookup)
    chosen = plan(agreement=agreement).model_copy(update={"gamma": gamma, "prompt_lookup": looking})
    panel = made(ReportData(source="p", plan=chosen))["positions"]
    return panel, [list(axes.lines) for axes in panel.figure.axes]


def lengths(lines: Sequence[Line2D]) -> set[int]:
    return {len(line.get_xydata()) for line in lines}


@pytest.mark.parametrize(
    ("gamma", "lookup", "until", "said"),
    [
        (5, None, 5, "are predicted by replay."),
        (5, 2, 5, "Up to position 2 the figure mixes rounds that prompt lookup drafted with rounds of the layers."),
        (2, 5, 2, "Beyond position 2, shaded, only prompt lookup drafts"),
        (0, 5, 5, "Prompt lookup drafts all tokens"),
    ],
)
def test_positions_that_only_prompt_lookup_drafts_are_marked_and_not_multiplied(
    gamma: int, lookup: int | None, until: int, said: str
) -> None:
    panel, (each, product) = positions_of(gamma, lookup)
    assert said in panel.caption
    assert (lengths(each), lengths(product)) == ({5}, {until})
    legend = [text.get_text() for text in panel.figure.legends[0].get_texts()]
    assert ("prompt lookup only" in legend) is ("shaded" in panel.caption) is (until < 5)


def test_the_measured_line_is_broad_and_lies_under_the_predicted_ones() -> None:
    _, (lines, _) = positions_of(5, None)
    looks = {str(line.get_label()): (line.get_zorder(), -line.get_linewidth()) for line in lines}
    measured = looks.pop("measured")
    assert len(looks) == 2
    assert all(measured[0] < above and measured[1] < width for above, width in looks.values())


def test_positions_that_no_round_reached_or_recorded_are_not_drawn() -> None:
    _, (lines, _) = positions_of(5, None, (0.9, 0.5, 0.0, 0.0, 0.0))
    assert lengths(lines) == {3}
    assert "positions" not in made(ReportData(source="p", plan=plan(agreement=())))


@pytest.mark.parametrize(
    ("missing", "measured", "predicted"),
    [((), True, True), (("predicted", "predicted_on_held_out"), True, False), (("measured",), False, True)],
)
def test_the_caption_of_acceptance_names_only_the_lines_that_are_drawn(
    missing: Sequence[str], measured: bool, predicted: bool
) -> None:
    data = ReportData(source="p", plan=plan(**dict.fromkeys(missing)))
    caption = made(data)["positions"].caption
    assert ("measured" in caption, "predicted" in caption) == (measured, predicted)


@pytest.mark.parametrize(("recorded", "shown"), [(LOOKUP, "2 to 8 tokens, 7 drafted"), ({"x": 1}, "x 1")])
def test_prompt_lookup_is_shown_in_words(recorded: dict[str, int], shown: str) -> None:
    assert trial(1.0, {"prediction": {"lookup": recorded}}).lookup == shown


def test_a_bare_plan_shows_what_it_skips_and_nothing_that_it_does_not_know() -> None:
    data = ReportData(source="plan.json", plan=PLAN_OF_ONE)
    html = make_page(data).html
    assert panels_of(html) == ["skipped"]
    assert "skips 1 of 2 attention" in html
    assert tiles(data) == []


def test_a_study_without_a_plan_shows_its_best_trial_as_predicted() -> None:
    data = ReportData(source="study.db", study=study())
    assert verdict(data) == (
        "Best of 7 trials: lookup of 2 to 8 tokens, 7 drafted; on a miss skip 1 of 5 attention and 1 of 5 MLP "
        "sub-layers; gamma 3."
    )
    assert {tile.source for tile in tiles(data)} == {"predicted"}
    assert list(made(data)) == ["skipped", "pareto", "history", "sensitivity"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_study_of_one_trial_or_none_is_still_a_page(count: int) -> None:
    data = ReportData(source="study.db", study=study(count, sensitivity={}))
    expected = ["skipped", "pareto", "history"] if count else []
    assert panels_of(make_page(data).html) == expected


def test_a_study_whose_trials_all_ended_early_says_that_there_is_nothing_to_choose() -> None:
    pruned = [replace(trial, speedup=None) for trial in study().trials]
    data = ReportData(source="study.db", study=study(trials=pruned))
    html = make_page(data).html
    assert verdict(data) == "No trial is complete, so there is nothing to choose from yet."
    assert verdict(data) in html
    assert panels_of(html) == ["pareto", "history", "sensitivity"]
    assert 'id="best"' not in html


def test_malformed_records_are_left_out() -> None:
    odd = {"estimate": "fast", "draft_cost": float("nan"), "agreement": True, "prediction": [1], "worker": 7}
    read = trial(float("inf"), odd)
    assert (read.speedup, read.estimate, read.point, read.gamma, read.worker) == (None, None, None, None, "7")
    assert made(ReportData(source="s", study=study(trials=[read], sensitivity={}))) == {}


def test_trials_that_were_refused_before_any_replay_are_not_drawn_at_zero() -> None:
    refused = trial(None, {"estimate": 0.0, "draft_cost": 0.9})
    assert refused.speedup_or_estimate is None
    assert gains([refused, replace(refused, draft_spec=DraftSpec.of(SkipSet(attn={0})))], num_layers=1) == {}


def deep(layers: int) -> ReportData:
    """A plan that skips every second sub-layer, which has the longest list of sub-layers."""
    every_second = SkipSet(attn=range(0, layers, 2), mlp=range(1, layers, 2))
    trials = [Trial.of(replace(stored(index), draft_spec=DraftSpec.of(every_second))) for index in range(7)]
    matters = {(kind, layer): 0.83 + 0.17 * layer / layers for kind in ("attn", "mlp") for layer in range(layers)}
    searched = study(trials=trials, num_layers=layers, sensitivity=matters)
    return ReportData(source="plan.json", plan=plan(every_second, layers=layers), study=searched)


def crowded(figure: Figure) -> list[str]:
    """Neighbours among the tick labels of an axis that touch, or on a line have less than a digit between them."""
    FigureCanvasAgg(figure).draw()
    return [pair for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for pair in crowded_on(axis)]


def crowded_on(axis: Axis) -> list[str]:
    low, high = sorted(axis.get_view_interval())
    start, end, least = {"x": ("x0", "x1", DIGIT), "y": ("y0", "y1", 0)}[axis.axis_name]
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_text()]
    shown = [(tick.label1.get_text(), tick.label1.get_window_extent()) for tick in ticks if tick.label1.get_visible()]
    spans = sorted((getattr(box, start), getattr(box, end), text) for text, box in shown)
    return [f"{a} {b}" for (_, ended, a), (began, _, b) in pairwise(spans) if began - ended < least]


@pytest.mark.parametrize("layers", [3, 19, 23, 41, 80, 126])
def test_tick_labels_do_not_run_into_each_other_however_deep_the_model(layers: int) -> None:
    found = made(deep(layers))
    assert list(found) == ALL_PANELS
    assert {key: pairs for key, panel in found.items() if (pairs := crowded(panel.figure))} == {}


def test_legends_are_where_a_narrow_screen_shows_them() -> None:
    """A screen 400 pixels wide shows the left two thirds of a figure, which is 34rem wide."""
    legends = 0
    for panel in made(deep(80)).values():
        FigureCanvasAgg(panel.figure).draw()
        for legend in panel.figure.legends:
            assert legend.get_window_extent().x1 < panel.figure.bbox.width * 2 / 3, panel.key
            legends += 1
    assert legends == 4


def test_the_verdict_counts_the_sublayers_and_their_list_is_collapsed() -> None:
    data = deep(80)
    assert verdict(data) == "Speculate: skip 40 of 80 attention and 40 of 80 MLP sub-layers; gamma 3."
    html = make_page(data).html
    folded = re.findall(r"<details[^>]*><summary>[^<]*(?:<b[^<]*</b>)?</summary>(.*?)</details>", html)
    (listed,) = set(folded)
    assert len(folded) == 2, "below the verdict, and in the one row of the best trials"
    assert listed.startswith("attn 0, 2, 4, 6, ")
    assert "attn 0, 2" not in html.replace(listed, "")


def test_the_title_names_the_file_or_the_study_of_a_database_and_the_model() -> None:
    assert title(ReportData(source="/some/where/plan.json", plan=plan())) == "plan.json: llama, 5 layers"
    assert title(ReportData(source="plan.db", study=study())) == "plan.db: tiny-llama, 5 layers"
    url = "postgresql://me:***@host/trials"
    assert title(ReportData(source=url, study=study())) == "night: tiny-llama, 5 layers"
    assert title(ReportData(source="bare.json", plan=PLAN_OF_ONE)) == "bare.json"


def test_a_sensitivity_that_was_not_recorded_is_computed_from_the_trials_and_the_page_says_so() -> None:
    html = make_page(ReportData(source="s", study=study(sensitivity={}))).html
    assert "it is no experiment on each sub-layer" in html
    assert "it is no experiment on each sub-layer" not in rich_html()


def test_gains_are_mean_speedups_with_a_sublayer_skipped_less_those_with_it_run() -> None:
    made = {SkipSet(attn={0}): 1.5, SkipSet(attn={0}, mlp={1}): 1.3, SkipSet(mlp={1}): 1.0, SkipSet(): 1.0}
    trials = [Trial(number=i, draft_spec=DraftSpec.of(s), speedup=v) for i, (s, v) in enumerate(made.items())]
    found = gains(trials, num_layers=2)
    assert found == {("attn", 0): pytest.approx(0.4), ("mlp", 1): pytest.approx(-0.1)}


def test_the_best_trials_are_ten_different_sets_the_smaller_draft_first_among_equals() -> None:
    specs = [DraftSpec.of(SkipSet(attn=range((i + 1) % 13))) for i in range(26)]  # two are the whole model
    trials = [Trial(number=i, draft_spec=spec, speedup=1 + (i // 2) / 100) for i, spec in enumerate(specs)]
    best = study(trials=trials, num_layers=13).best(10)
    assert len({trial.skip_set for trial in best}) == 10
    assert [trial.number for trial in best[:3]] == [24, 23, 22]
    assert [trial.speedup for trial in best] == sorted((t.speedup or 0 for t in best), reverse=True)


def test_the_page_shows_all_settings_and_versions() -> None:
    groups = settings(rich())
    assert groups["model"]["fingerprint"] == "00ff"
    assert (groups["search"]["torch"], groups["search"]["seed"]) == ("2.13.0", "17")
    assert groups["study"]["sampling"] == "top_k 13"
    assert groups["study"]["workers"] == "host-0, host-1, host-2"
    html = rich_html()
    assert all(value in html for group in groups.values() for value in group.values())


@pytest.mark.parametrize(("recorded", "said"), [("night", True), ("day", False), (None, False)])
def test_the_page_calls_a_plan_the_fastest_only_in_its_own_study(recorded: str | None, said: bool) -> None:
    html = make_page(ReportData(source="p", plan=plan(study=recorded), study=study())).html
    assert ("the chosen plan was the fastest, to within 0.01" in html) is said


def test_a_plan_of_another_model_than_the_study_is_refused() -> None:
    with pytest.raises(InputError, match="for a model of 7 layers, but study 'night' searched one of 5"):
        ReportData(source="s", plan=plan(layers=7), study=study())


# --- files and storages ---


def fill(storage: Path, name: str = "night", count: int = 5) -> Path:
    with Store.open(str(storage), name, {"model": "tiny-llama"}, num_layers=LAYERS) as store:
        store.share(lambda: {"sensitivity": json.dumps({"attn_3": 0.75, "mlp_0": 0.5, "other": 1}).encode()})
        for index in range(count):
            trial = stored(index)
            with store.begin(trial.draft_spec) as running:
                if trial.value is None:
                    running.prune(trial.record["estimate"], trial.record)
                else:
                    running.finish(trial.value, trial.record)
    return storage


run, complaint = partial(commands.run, "report"), partial(commands.complaint, "report")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("storage") / "study.db")


@pytest.mark.parametrize("scheme", ["", "sqlite:///", "journal"])
def test_a_study_is_read_from_a_file_from_a_url_and_from_a_journal(storage: Path, tmp_path: Path, scheme: str) -> None:
    source = str(fill(tmp_path / "study.journal")) if scheme == "journal" else f"{scheme}{storage}"
    read = read_source(source).study
    assert read is not None
    assert (read.name, read.num_layers, read.identity["model"]) == ("night", LAYERS, "tiny-llama")
    assert [trial.skip_set for trial in read.trials] == [stored(index).draft_spec.skip_set for index in range(5)]
    assert [trial.speedup for trial in read.trials] == [stored(index).value for index in range(5)]
    assert read.sensitivity == {("attn", 3): 0.75, ("mlp", 0): 0.5}


@pytest.mark.slow
def test_optuna_itself_lists_the_trials_of_a_search_with_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`optuna-dashboard` shows this list."""
    monkeypatch.setattr("selfspec_search.profile.profile.CYCLES", 1)  # rough costs are enough
    prompts = [torch.randint(1, VOCABULARY, (length,), generator=torch.manual_seed(length)) for length in (5, 11, 2)]
    storage, few = str(tmp_path / "plan.db"), {"gamma_max": 3, "new_tokens": 11, "confirm": 1, "repeats": 1}
    settings = SearchSettings(trials=9, study_name="ours", storage=storage, **few)
    search(damped_model("llama", ENDS_SKIPPED), prompts, prompts[:1], settings)
    ours = load_study(storage).trials
    theirs = optuna.load_study(study_name="ours", storage=f"sqlite:///{storage}")
    listed = [trial for trial in theirs.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(listed) == 9
    assert [(trial.number, trial.value) for trial in listed] == [(trial.number, trial.value) for trial in ours]
    for shown, trial in zip(listed, ours, strict=True):
        skipped = {name for name, choice in shown.params.items() if choice == "skip"}
        assert len(shown.params) == 2 * TINY_LAYERS
        assert skipped == {f"{kind}_{layer}" for kind, layer in trial.draft_spec.skip_set}
        promised = {} if shown.state == TrialState.COMPLETE else {0: trial.record["estimate"]}
        assert shown.intermediate_values == promised
    assert theirs.best_value == max(trial.value for trial in ours if trial.value is not None)


def test_the_command_writes_the_page_next_to_the_storage_and_figures_into_the_named_directory(
    storage: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "my study.db"
    copied.write_bytes(storage.read_bytes())
    result = run(copied, "--png", tmp_path / "a" / "b")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "my study_report.html").read_text("utf8").startswith("<!DOCTYPE html>")
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} >= {"pareto.png", "history.png"}


def test_a_plan_is_reported_with_the_study_next_to_it(storage: Path, tmp_path: Path) -> None:
    saved = Plan(skip_set=stored(3).draft_spec.skip_set, gamma=2).save(tmp_path / "plan.json")
    assert read_source(str(saved)).study is None
    (tmp_path / "plan.db").write_bytes(storage.read_bytes())
    chosen = read_source(str(saved)).chosen_trial
    assert chosen is not None
    assert chosen.skip_set == stored(3).draft_spec.skip_set


def test_the_page_of_a_directory_with_a_plan_is_written_into_the_directory(tmp_path: Path) -> None:
    PLAN_OF_ONE.save(tmp_path / PLAN_FILE)
    assert run(tmp_path).exit_code == 0
    assert (tmp_path / "selfspec_plan_report.html").is_file()


def test_a_study_is_reported_with_a_plan_that_is_named(storage: Path, tmp_path: Path) -> None:
    chosen = Plan(skip_set=stored(2).draft_spec.skip_set, gamma=2).save(tmp_path / "other.json")
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
    assert "--study: 'night', 'day'" in complaint(both)
    assert run(both, "--study", "day").exit_code == 0
    assert "evening" in complaint(both, "--study", "evening")


def test_what_is_neither_a_plan_nor_a_storage_takes_one_line(tmp_path: Path) -> None:
    neither = "neither a plan (JSON) nor a study's storage"
    files = {
        "notes.txt": (b"hello", neither),
        "empty": (b"", neither),
        "broken.db": (b"SQLite format 3\x00" + b"\xff" * 100, "broken.db"),
    }
    for name, (data, line) in files.items():
        (tmp_path / name).write_bytes(data)
        assert line in complaint(tmp_path / name)
    assert "there is no file" in complaint(tmp_path / "gone.json")
    assert PLAN_FILE in complaint(tmp_path)
    optuna.create_study(storage=f"sqlite:///{tmp_path}/alien.db", study_name="alien")
    assert "holds no study" in complaint(tmp_path / "alien.db")
    assert not list(tmp_path.glob("*.html"))


def test_options_that_do_not_fit_the_source_take_one_line(storage: Path, tmp_path: Path) -> None:
    saved = PLAN_OF_ONE.save(tmp_path / "plan.json")
    assert "leave out --plan" in complaint(saved, "--plan", saved)
    assert "no storage" in complaint(saved, "--study", "night")
    assert "no plan at" in complaint(storage, "--plan", tmp_path / "gone.json", "--out", tmp_path / "x.html")


def test_pages_and_figures_that_cannot_be_written_take_one_line(tmp_path: Path) -> None:
    saved = PLAN_OF_ONE.save(tmp_path / "plan.json")
    assert "there is no directory" in complaint(saved, "--out", tmp_path / "gone" / "page.html")
    assert "cannot write figures" in complaint(saved, "--png", saved)
    with pytest.raises(InputError, match="cannot write"):
        write_report(ReportData(source="p", plan=PLAN_OF_ONE), tmp_path / "gone" / "page.html")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_protected_directory_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "not writable" in complaint("postgresql://nowhere/x", "--out", tmp_path / "page.html")
