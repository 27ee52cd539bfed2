"""Provenance: what the search saw that found a plan."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from selfspec.plan.schema import Strict


class Conditions(Strict):
    """Where and how the search ran: another device, dtype or sampling makes its figures (not its output) stale.

    `context` is how many tokens a row had cached on average while it was decoded.
    """

    device: str
    dtype: str
    rows: int = 1
    context: int | None = None
    sampling: dict[str, Any] = Field(default_factory=dict)
    compiled: bool = False
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def do_sample(self) -> bool:
        """Whether the search was for sampling, and not for greedy decoding."""
        return bool(self.sampling.get("do_sample", False))


class Figures(Strict):
    """Speed of one plan, predicted or measured; speedup is against the plain model in the same run.

    `agreement` is by draft position: the share accepted of tokens drafted there behind an accepted prefix. Measured
    figures have the speedup's 95 % `interval`, and the lowest, median and highest tokens per round of a prompt as
    `spread`.
    """

    tokens_per_round: float
    acceptance_rate: float
    tokens_per_second: float
    speedup: float
    texts: int = 0
    agreement: list[float] = Field(default_factory=list)
    interval: list[float] = Field(default_factory=list)
    spread: list[float] = Field(default_factory=list)


class Provenance(Strict):
    """What the search saw: predicted and measured figures side by side.

    `errors` are measured over predicted on the texts that were decoded, less 1; of the best contender where plain
    decoding won. `study` is the study's name in its storage.
    """

    conditions: Conditions
    seed: int
    trials: int
    study: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    predicted: Figures | None = None
    predicted_on_held_out: Figures | None = None
    measured: Figures | None = None
    errors: dict[str, float] = Field(default_factory=dict)
