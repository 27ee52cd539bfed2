"""Panels: title, figure and caption, which says how the figure was computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.figure import Figure

from selfspec.plan.plan import Plan
from selfspec.plan.sublayers import SkipSet
from selfspec_search.report import figures, grids
from selfspec_search.report.data import ReportData, Trial
from selfspec_search.report.words import counted, draft_weights_of, interval, skipped_of
from selfspec_search.space import Sublayer, sublayers

IDEAL = "(1 + a + … + a^gamma) / (gamma c + 1)".replace(" ", "\u00a0")
"""The speedup of an idealised model: every drafted token agrees with probability a, and a draft step costs c."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A figure of the page. `key` names its link and its PNG."""

    key: str
    title: str
    figure: Figure
    caption: str


def panels(data: ReportData) -> Iterator[Panel]:
    """All panels with data, in the order of the page."""
    for make in (_strip, _pareto, _history, _comparison, _positions, _sensitivity):
        panel = make(data)
        if panel is not None:
            yield panel


def _strip(data: ReportData) -> Panel | None:
    draft_spec, layers = data.drafted_with, data.num_layers
    if draft_spec is None or not layers:
        return None
    lost = len(draft_spec.skip_set.dropped_layers())
    dropped = f"; {counted(lost, 'layer')} completely" if lost else ""
    whose = "The plan" if data.plan else "The best trial"
    return Panel(
        key="skipped",
        title="What the draft is made of" if draft_spec.quantised else "What the draft leaves out",
        figure=grids.strip(draft_spec, layers),
        caption=f"{whose} skips {skipped_of(draft_spec, layers)}{dropped}{draft_weights_of(draft_spec)}. The full "
        "model still checks every token.",
    )


def _pareto(data: ReportData) -> Panel | None:
    study = data.study
    if study is None or not study.front():
        return None
    name = "chosen plan" if data.plan else "best trial"
    with_lookup = any(trial.lookup for trial in study.trials)
    lookup = ", and they count the tokens that prompt lookup drafts before the layers do" if with_lookup else ""
    return Panel(
        key="pareto",
        title="Draft cost against agreement",
        figure=figures.pareto(study, data.chosen_trial, name),
        caption="Every trial, predicted: the cost of a draft step (from the profile), and how often the first drafted "
        "token is the model's own (by replay). No trial is both cheaper and in better agreement than a trial on the "
        f"front. {_mark(data, name)} Grey lines join points of equal speedup in an idealised model, the best over "
        f"gamma of {IDEAL} for agreement a and cost c: agreement is the same at every position, and a check costs one "
        f"plain step. The trials' own speedups, shown as colours, assume neither{lookup}.",
    )


def _mark(data: ReportData, name: str) -> str:
    if data.chosen_trial is not None:
        known = data.chosen_trial.point is not None
        return f"The ring marks the {name}." if known else f"The cost or the agreement of the {name} is not known."
    if data.plan is None:
        return "No trial is complete, so none is marked."
    return "The plan's skip set is not among them." if data.plan.gamma else "The plan runs no layer-skipping draft."


def _history(data: ReportData) -> Panel | None:
    study = data.study
    if study is None or all(trial.speedup_or_estimate is None for trial in study.trials):
        return None
    pruned = len(study.trials) - len(study.complete)
    workers = f" by {len(study.workers)} workers" if len(study.workers) > 1 else ""
    return Panel(
        key="history",
        title="How the search went",
        figure=figures.history(study),
        caption=f"Predicted speedup of {counted(len(study.complete), 'complete trial')}{workers}, in the order in "
        f"which the trials began, and the best so far. {counted(pruned, 'trial')} ended early, drawn at the speedup "
        "estimated from the first draft position. Plain decoding is 1.",
    )


def _comparison(data: ReportData) -> Panel | None:
    given = data.figures
    if not given or data.plan is None or not data.plan.speculates:
        return None
    names = {"speedup": "speedup", "tokens per round": "tokens_per_round", "tokens per second": "tokens_per_second"}
    bars = {title: {label: getattr(f, name) for label, f in given.items()} for title, name in names.items()}
    measured = given.get("measured")
    intervals = {"speedup": measured.interval if measured else []}
    how = "Nothing was measured yet: measure the plan with 'selfspec bench'."
    if measured:
        prompts = counted(measured.texts, "held-out prompt") if measured.texts else "held-out prompts"
        how = f"Measured: by decoding {prompts}, in turn with the plain model in the same run."
        if measured.interval:
            how += f" The speedup on similar prompts is {interval(measured.interval)} with 95 % confidence (thin line)."
    return Panel(
        key="predicted-measured",
        title="Predicted against measured",
        figure=figures.comparison(bars, intervals),
        caption="Predicted: by replay and the latency profile, without decoding, on the calibration prompts, for which "
        f"the plan was chosen, and on held-out prompts, which the search did not use. {how} Speedups are against "
        "plain decoding; errors are measured over predicted, less 1.",
    )


def _positions(data: ReportData) -> Panel | None:
    given = {label: _reached(figures.agreement) for label, figures in data.figures.items()}
    lines = {label: values for label, values in given.items() if values}
    if not lines or data.plan is None or not data.plan.speculates:
        return None
    return Panel(
        key="positions",
        title="Acceptance by draft position",
        figure=figures.positions(lines, data.plan.gamma or None),
        caption="Left: of the tokens drafted at this position after an accepted prefix, the share that was accepted. "
        "Right: the product of these shares, the share of rounds that would accept at least this many tokens if every "
        f"round drafted them. {_line_styles(lines)}{_who_drafts(data.plan)}",
    )


def _reached(agreement: Sequence[float]) -> Sequence[float]:
    """Positions up to the last accepted token: a position that no round reached is also recorded as 0."""
    return agreement[: agreement.index(0.0) + 1] if 0.0 in agreement else agreement


def _line_styles(lines: Mapping[str, Sequence[float]]) -> str:
    measured = ["The broad line is measured by decoding."] if "measured" in lines else []
    predicted = ["Broken lines are predicted by replay."] if set(lines) - {"measured"} else []
    return " ".join(measured + predicted)


def _who_drafts(plan: Plan) -> str:
    if plan.prompt_lookup is None:
        return ""
    if not plan.gamma:
        return " Prompt lookup drafts all tokens, in the rounds where it finds a match."
    mixed = min(plan.gamma, plan.prompt_lookup.gamma)
    text = f" Up to position {mixed} the figure mixes rounds that prompt lookup drafted with rounds of the layers."
    if plan.prompt_lookup.gamma > plan.gamma:
        text += (
            f" Beyond position {plan.gamma}, shaded, only prompt lookup drafts. Few rounds reach these positions, and "
            "they repeat earlier text: agreement there is rough and holds for no other rounds. The figure on the right "
            "ends before them."
        )
    return text


def _sensitivity(data: ReportData) -> Panel | None:
    study = data.study
    if study is None:
        return None
    dotted = data.draft_spec.skip_set if data.draft_spec is not None else SkipSet()
    dots = f" Dots mark the sub-layers that the {'plan' if data.plan else 'best trial'} skips." if dotted else ""
    if study.sensitivity:
        values, differences = study.sensitivity, False
        caption = (
            "Predicted, by replay: how often the first drafted token is the model's own if only this sub-layer is "
            f"skipped. The draft needs dark sub-layers most; values below the scale have the darkest colour.{dots}"
        )
    else:
        values, differences = gains(study.trials, study.num_layers), True
        caption = (
            "Predicted: the mean speedup of the trials that skip this sub-layer, less the mean of those that run it. "
            "Red sub-layers are better run, blue ones better skipped. The search favours good skip sets, so the figure "
            f"shows where the search went; it is no experiment on each sub-layer.{dots}"
        )
    if not values:
        return None
    drawn = grids.sensitivity(values, study.num_layers, dotted, differences=differences)
    return Panel(key="sensitivity", title="How much each sub-layer matters", figure=drawn, caption=caption)


def gains(trials: Sequence[Trial], num_layers: int) -> Mapping[Sublayer, float]:
    """Mean predicted speedup with the sub-layer skipped, less the mean with the sub-layer kept.

    Sub-layers that all trials skip, or that all trials keep, are left out.
    """
    speedups = [(set(trial.skip_set), trial.speedup_or_estimate) for trial in trials]
    known = [(skipped, speedup) for skipped, speedup in speedups if speedup is not None]
    found: dict[Sublayer, float] = {}
    for sublayer in sublayers(num_layers):
        without = [speedup for skipped, speedup in known if sublayer in skipped]
        with_it = [speedup for skipped, speedup in known if sublayer not in skipped]
        if without and with_it:
            found[sublayer] = fmean(without) - fmean(with_it)
    return found
