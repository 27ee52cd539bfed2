"""Panels: title, figure and caption, which says how the figure was computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.figure import Figure

from selfspec.plan import Figures, Plan
from selfspec.plan.sublayers import SkipSet
from selfspec_search.report import figures, grids
from selfspec_search.report.data import ReportData, StudyData, Sublayer, Trial
from selfspec_search.report.words import counted, draft_weights_of, interval


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


def provenance_figures(data: ReportData) -> dict[str, Figures]:
    """The plan's figures by source; only 'measured' comes from decoding."""
    provenance = data.plan.provenance if data.plan else None
    if provenance is None:
        return {}
    named = {
        "predicted, calibration": provenance.predicted,
        "predicted, held-out": provenance.predicted_on_held_out,
        "measured": provenance.measured,
    }
    return {label: given for label, given in named.items() if given is not None}


def _strip(data: ReportData) -> Panel | None:
    draft_spec, layers = data.drafted_with, data.num_layers
    if draft_spec is None or not layers:
        return None
    skip_set = draft_spec.skip_set
    lost = len(skip_set.dropped_layers())
    dropped = f"; {counted(lost, 'layer')} in whole" if lost else ""
    whose = "The plan" if data.plan else "The best trial"
    return Panel(
        key="skipped",
        title="What the draft is made of" if draft_spec.quantised else "What the draft leaves out",
        figure=grids.strip(draft_spec, layers),
        caption=f"{whose} skips {len(skip_set.attn)} of {layers} attention and {len(skip_set.mlp)} of {layers} MLP "
        f"sub-layers{dropped}{draft_weights_of(draft_spec)}. Every token is still checked by the whole model.",
    )


def _pareto(data: ReportData) -> Panel | None:
    study = data.study
    if study is None or not study.front():
        return None
    chosen = data.chosen_trial
    name = "chosen plan" if data.plan else "best trial"
    return Panel(
        key="pareto",
        title="Draft cost against agreement",
        figure=figures.pareto(study, chosen, name),
        caption="Every trial, predicted: how much a draft step costs (from the profile) and how often its first token "
        f"is the model's own (by replay). Trials on the front are beaten by none in both. {_mark(data, name)} Grey "
        f"lines join points of equal speedup in an idealised model, the best over gamma of {_IDEAL} for agreement a "
        "and cost c: the same agreement at every position, and a check that costs one plain step. The trials' own "
        f"speedups, the colours, assume neither{_lookup_helps(study)}.",
    )


_IDEAL = "(1 + a + … + a^gamma) / (gamma c + 1)".replace(" ", "\u00a0")


def _mark(data: ReportData, name: str) -> str:
    if data.chosen_trial is not None:
        return f"The ring marks the {name}." if data.chosen_trial.point else f"The {name} is at no known point."
    if data.plan is None:
        return "No trial was whole, so none is marked."
    return "The plan's skip set is not among them." if data.plan.gamma else "The plan runs no layer-skipping draft."


def _lookup_helps(study: StudyData) -> str:
    return ", and count what prompt lookup drafts before the layers do" if any(t.lookup for t in study.trials) else ""


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
        caption=f"Predicted speedup of {counted(len(study.complete), 'whole trial')}{workers}, in the order in which "
        f"they began, and the best so far. {pruned} ended early, drawn at what their first draft position promised. "
        "Plain decoding is 1.",
    )


def _comparison(data: ReportData) -> Panel | None:
    given = provenance_figures(data)
    if not given or data.plan is None or not data.plan.speculates:
        return None
    names = {"speedup": "speedup", "tokens per round": "tokens_per_round", "tokens per second": "tokens_per_second"}
    bars = {title: {label: getattr(f, name) for label, f in given.items()} for title, name in names.items()}
    measured = given.get("measured")
    intervals = {"speedup": measured.interval if measured else []}
    how = (
        f"Measured is by decoding {_texts(measured)}, in turn with the plain model in the same run{_sure(measured)}."
        if measured
        else "Nothing was measured yet: confirm the plan by 'selfspec bench'."
    )
    return Panel(
        key="predicted-measured",
        title="Predicted against measured",
        figure=figures.comparison(bars, intervals),
        caption="Predicted is by replay and the latency profile, without decoding: on the calibration prompts, by "
        f"which the plan was chosen, and on held-out ones, which it never saw. {how} Speedups are against plain "
        "decoding; errors are measured over predicted, less 1.",
    )


def _sure(measured: Figures) -> str:
    sure = f"; the speedup on prompts like these is {interval(measured.interval)} with 95 % confidence (the thin line)"
    return sure if measured.interval else ""


def _texts(given: Figures) -> str:
    return counted(given.texts, "held-out prompt") if given.texts else "held-out prompts"


def _positions(data: ReportData) -> Panel | None:
    given = {label: _reached(figures.agreement) for label, figures in provenance_figures(data).items()}
    lines = {label: values for label, values in given.items() if values}
    if not lines or data.plan is None or not data.plan.speculates:
        return None
    return Panel(
        key="positions",
        title="Acceptance by draft position",
        figure=figures.positions(lines, data.plan.gamma or None),
        caption="Left: of the tokens drafted at this position after an accepted prefix, the share that was accepted. "
        "Right: their product, the share of rounds that would accept at least this many tokens if all drafted them. "
        f"{_looks(lines)}{_who_drafts(data.plan)}",
    )


def _reached(agreement: Sequence[float]) -> Sequence[float]:
    """Positions up to the last accepted token: a position that no round reached is also recorded as 0."""
    return agreement[: agreement.index(0.0) + 1] if 0.0 in agreement else agreement


def _looks(lines: Mapping[str, Sequence[float]]) -> str:
    broad = "The broad line is measured by decoding" if "measured" in lines else ""
    broken = "broken lines are predicted by replay" if set(lines) - {"measured"} else ""
    said = ", ".join(filter(None, (broad, broken)))
    return f"{said[0].upper()}{said[1:]}."


def _who_drafts(plan: Plan) -> str:
    if plan.prompt_lookup is None:
        return ""
    if not plan.gamma:
        return " All is drafted by prompt lookup, in the rounds where it finds a match."
    mixed = min(plan.gamma, plan.prompt_lookup.gamma)
    said = f" Up to position {mixed} this mixes rounds that prompt lookup drafted with rounds of the layers."
    if plan.prompt_lookup.gamma > plan.gamma:
        said += (
            f" Beyond position {plan.gamma}, shaded, only prompt lookup drafts: the rounds that get there are often "
            "few, and repeat what was written before, so agreement there is rough, and no other round's; the figure "
            "on the right ends before."
        )
    return said


def _sensitivity(data: ReportData) -> Panel | None:
    study = data.study
    if study is None:
        return None
    dotted = data.draft_spec.skip_set if data.draft_spec is not None else SkipSet()
    dots = " Dots are what the " + ("plan" if data.plan else "best trial") + " skips." if dotted else ""
    if study.sensitivity:
        values, differences = study.sensitivity, False
        caption = (
            "Predicted, by replay: how often the first drafted token is the model's own when this one sub-layer alone "
            f"is skipped. The darker, the more it is needed; those below the scale are darkest.{dots}"
        )
    else:
        values, differences = gains(study.trials, study.num_layers), True
        caption = (
            "From the trials, predicted: the mean speedup of those that skip this sub-layer less that of those that "
            "run it. Red is better run, blue is better skipped. The search favours good sets, so this shows where it "
            f"went, and is no experiment on each sub-layer.{dots}"
        )
    if not values:
        return None
    drawn = grids.sensitivity(values, study.num_layers, dotted, differences=differences)
    return Panel(key="sensitivity", title="How much each sub-layer matters", figure=drawn, caption=caption)


def gains(trials: Sequence[Trial], num_layers: int) -> Mapping[Sublayer, float]:
    """Mean predicted speedup with the sub-layer skipped, less the mean with the sub-layer kept; only with trials of
    both."""
    known = [(trial.skip_set, trial.speedup_or_estimate) for trial in trials]
    found: dict[Sublayer, float] = {}
    for layer in range(num_layers):
        for kind in grids.KINDS:
            sides: dict[bool, list[float]] = {True: [], False: []}
            for skip_set, speedup in known:
                if speedup is not None:
                    sides[layer in getattr(skip_set, kind)].append(speedup)
            if sides[True] and sides[False]:
                found[kind, layer] = fmean(sides[True]) - fmean(sides[False])
    return {sublayer: gain for sublayer, gain in found.items() if math.isfinite(gain)}
