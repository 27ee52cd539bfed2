"""Metrics: the counts of `Stats` for Prometheus, with the names that dashboards of speculative decoding use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from selfspec.errors import InputError, SelfspecError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    from selfspec.decoding.stats import Stats

PREFIX = "selfspec_"


@dataclass(frozen=True)
class _Figure:
    """A metric. `of` reads one number from `Stats`, or one number for each value of `label`."""

    kind: Literal["counter", "gauge"]
    name: str  # without PREFIX
    help: str
    of: Callable[[Stats], float | Mapping[str, float]]
    label: str = ""

    @property
    def labels(self) -> list[str]:
        return [self.label] if self.label else []

    def samples(self, stats: Stats) -> list[tuple[list[str], float]]:
        """Pairs of label values and a number."""
        value = self.of(stats)
        return [([key], number) for key, number in value.items()] if isinstance(value, Mapping) else [([], value)]


_counter, _gauge = partial(_Figure, "counter"), partial(_Figure, "gauge")


def _by_position(counts: Sequence[int]) -> dict[str, float]:
    return {str(position): count for position, count in enumerate(counts)}


def _by_phase(stats: Stats) -> dict[str, float]:
    """The phases add up to the total, unless the device's clock runs ahead of the host's clock."""
    parts = {name: seconds for name, seconds in stats.seconds.items() if name != "total"}
    return parts | {"other": max(0.0, stats.other_seconds)}


def _of_origins(stats: Stats, which: int) -> dict[str, float]:
    return {origin: counts[which] for origin, counts in stats.by_origin.items()}


# Metrics that vLLM also has keep vLLM's names, with our prefix in place of `vllm:`. Positions count from 0, as in vLLM.
FIGURES = (
    _counter("rows", "Rows of requests that were decoded.", lambda stats: stats.rows),
    _counter("generation_tokens", "Tokens written.", lambda stats: stats.tokens),
    _counter("rounds", "Rounds: a verify pass over three rows is three.", lambda stats: stats.rounds),
    _counter("spec_decode_num_drafts", "Rounds that drafted.", lambda stats: sum(stats.reached_at[:1])),
    _counter("spec_decode_num_draft_tokens", "Tokens drafted.", lambda stats: stats.drafted),
    _counter("spec_decode_num_accepted_tokens", "Drafted tokens accepted.", lambda stats: stats.accepted),
    _counter(
        "spec_decode_num_accepted_tokens_per_pos",
        "Drafted tokens accepted, by position in the draft.",
        lambda stats: _by_position(stats.accepted_at),
        "position",
    ),
    _counter(
        "spec_decode_num_reached_tokens_per_pos",
        "Tokens drafted after an accepted prefix, by position in the draft.",
        lambda stats: _by_position(stats.reached_at),
        "position",
    ),
    _counter(
        "spec_decode_num_draft_tokens_by_origin",
        "Tokens drafted, by who drafts.",
        lambda stats: _of_origins(stats, 0),
        "origin",
    ),
    _counter(
        "spec_decode_num_accepted_tokens_by_origin",
        "Drafted tokens accepted, by who drafts.",
        lambda stats: _of_origins(stats, 1),
        "origin",
    ),
    _counter("verify_passes", "Passes of the full model, prefill not counted.", lambda stats: stats.passes),
    _counter("draft_passes", "Passes of the draft.", lambda stats: stats.steps),
    _counter("choice_passes", "Passes of the full model, by policy choice.", lambda stats: stats.choices, "choice"),
    _counter("phase_seconds", "Time spent decoding, by phase.", _by_phase, "phase"),
    _gauge("tokens_per_second", "Of the latest request, prefill included.", lambda stats: stats.tokens_per_second),
    _gauge("tokens_per_round", "Of the latest request.", lambda stats: stats.tokens_per_round),
    _gauge(
        "spec_decode_draft_acceptance_rate",
        "Accepted / drafted of the latest request.",
        lambda stats: stats.acceptance_rate if stats.drafted else math.nan,  # 0 would look like a draft that is wrong
    ),
    _gauge("draft_bytes", "Memory of the draft weights in addition to the model.", lambda stats: stats.draft_bytes),
    _gauge("graph_bytes", "Memory of captured CUDA graphs.", lambda stats: stats.graph_bytes),
)


class Metrics:
    """Metrics for a Prometheus server. Counters sum over requests; gauges show the latest request.

        metrics = selfspec.Metrics(labels=["model"])
        prometheus_client.start_http_server(9100)
        ...
        metrics.observe(spec.stats, model="llama")  # once after each request

    Args:
        registry: where to register the metrics; by default the registry that prometheus_client serves.
        labels: names of further labels. `observe` takes the labels' values.

    Raises:
        InputError: the registry already has such metrics, or a label's name is not allowed.
        SelfspecError: the package `prometheus-client` is missing.
    """

    def __init__(self, registry: CollectorRegistry | None = None, labels: Sequence[str] = ()) -> None:
        require_client()
        from prometheus_client import REGISTRY

        registry = REGISTRY if registry is None else registry
        self._labels = _names(labels)
        if taken := sorted({figure.label for figure in FIGURES} & {*self._labels}):
            raise InputError(f"label '{taken[0]}' is one of the metrics' own; choose another label")
        try:
            self._metrics = [_registered(figure, self._labels, registry) for figure in FIGURES]
        except ValueError as error:  # metrics that are registered already, and names that Prometheus does not allow
            raise InputError(f"{error}; make one Metrics per registry, with plain words as labels") from None

    def observe(self, stats: Stats, **labels: str) -> None:
        """Add the stats of one request. A second call with the same stats counts twice. Any thread may call this."""
        if labels.keys() != {*self._labels}:
            given, expected = (", ".join(sorted(names)) or "none" for names in (labels, self._labels))
            raise InputError(f"labels given: {given}, labels of these metrics: {expected}; give each label a value")
        own = [labels[name] for name in self._labels]
        for figure, metric in zip(FIGURES, self._metrics, strict=True):
            for values, number in figure.samples(stats):
                one = metric.labels(*own, *values) if own or values else metric
                one.inc(number) if figure.kind == "counter" else one.set(number)  # type: ignore[union-attr]


def _names(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels as a tuple; raises `InputError` unless the labels are different strings."""
    advice = "give a list of different names, such as labels=['model']"
    if isinstance(labels, str):
        raise InputError(f"labels is '{labels}', so every letter would be a label; {advice}")
    names = tuple(labels)
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"labels holds {name!r}, but names are strings; {advice}")
        if names.count(name) > 1:
            raise InputError(f"labels holds '{name}' twice; {advice}")
    return names


def _registered(figure: _Figure, labels: Sequence[str], registry: CollectorRegistry) -> Counter | Gauge:
    from prometheus_client import Counter, Gauge

    names = [*labels, *figure.labels]
    if figure.kind == "counter":
        return Counter(PREFIX + figure.name, figure.help, names, registry=registry)
    return Gauge(PREFIX + figure.name, figure.help, names, registry=registry, multiprocess_mode="mostrecent")


def to_text(stats: Stats) -> str:
    """One call's figures in Prometheus' text format, without any registry.

    Raises:
        SelfspecError: the package `prometheus-client` is missing.
    """
    require_client()
    from prometheus_client import generate_latest

    return generate_latest(_Once(stats)).decode()  # type: ignore[arg-type]


@dataclass
class _Once:
    """One call's figures as a Prometheus collector."""

    stats: Stats

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        for figure in FIGURES:
            family = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
            metric = family(PREFIX + figure.name, figure.help, labels=figure.labels)
            for values, number in figure.samples(self.stats):
                metric.add_metric(values, number)
            yield metric


def require_client() -> None:
    """Raise `SelfspecError` if the package `prometheus-client` is missing."""
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        raise SelfspecError(
            "figures for Prometheus need the package prometheus-client; pip install 'selfspec[metrics]'"
        ) from None
