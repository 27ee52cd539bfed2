"""Cells of quantised drafts: one shape, format and agreement, against plain decoding. *Time real, agreement set.*"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from common.budget import LeftOutError

from selfspec import DraftSpec, Format, Plan, Quantised, SkipSet, wrap
from selfspec.benchmark.contenders import GENERATE, PLAIN, Contender, HuggingFace, Ours, plain_contenders
from selfspec.benchmark.measure import Measurement, measure
from selfspec.plan.round_costs import PassLengths
from shapes.agreement import distinct_share, drafted_agreement, find_scale
from shapes.dial import Dial
from shapes.drafts import share_skipped, with_head, with_skips
from shapes.effort import Effort
from shapes.limits import ideal_speedup
from shapes.passes import Ceiling, Passes
from shapes.skip_cells import BASIS, PROBING
from shapes.subject import Subject

DRAFTED = "drafted"
REACH = 16.0
"""The largest scale: int8 rounds so little that only a distant target disagrees."""
FIRST_GUESS = 3.0
"""Scale per disagreement in 4 bits, roughly."""
OUT_OF_REACH = 2
"""Tolerances: an agreement that is missed by more is out of reach."""

Turn = Callable[[float], dict[str, float]]
"""Sets the target's distance from the draft, from 0 to 1; returns the scales that it set, by name."""


class QuantisedBench:
    """Decodes one shape plainly, and with drafts in one format.

    Attributes:
        spec: our decoder. Its copies are made once, of the drawn weights; its plan changes with the cell.
        scales: of the dial, by agreement.
    """

    def __init__(self, subject: Subject, format: Format, effort: Effort) -> None:
        self.subject, self.format, self.effort = subject, format, effort
        subject.restore()
        self.everything = DraftSpec(quantised=Quantised.everything(format, subject.num_layers))
        self.passes: Passes | None = None
        self.spec = wrap(subject.model, self._plan(self.everything, PROBING), policy="fixed")
        self.dial = Dial(subject, format, keep=subject.device.type == "cpu")
        self.prompts = [batch[0] for batch in subject.prompts(effort.prompts, 1, effort.prompt_length)]
        self.scales: dict[float, float] = {}

    def measure(self, agreement: float, *, skipping: bool) -> dict[str, Any]:
        """All figures of one cell.

        The draft is quantised as a whole; with `skipping`, it also skips the published share of sub-layers.
        """
        turn, draft, skip_set = self.turn_of(agreement), with_head(self.format), None
        if skipping:
            turn, skip_set = self.turn_with_skips(agreement), self.subject.skip_set
            draft = f"{draft}, {share_skipped(skip_set, self.subject.num_layers)}"
        assert self.passes is not None, "passes are measured first"
        best, effort = Ceiling.of(self.passes, draft, agreement), self.effort
        self.draft_by(skip_set, best.gamma)

        def agreement_at(share: float) -> float:
            turn(share)
            return self.agreement()

        guess = FIRST_GUESS * (1 - agreement) / (1 if skipping else REACH)
        share, reached = find_scale(
            agreement_at, agreement, guess=guess, tolerance=effort.tolerance, steps=effort.steps
        )
        was_set = turn(share)
        measured = measure(self.contenders(), self.prompts, new_tokens=effort.new_tokens, repeats=effort.repeats)
        return {
            "draft": draft,
            "basis": BASIS,
            "agreement_wanted": agreement,
            "agreement": reached,
            "out_of_reach": abs(reached - agreement) > OUT_OF_REACH * effort.tolerance,
            **was_set,
            "requantised": self.dial.requantised(skip_set),
            "gamma": best.gamma,
            **self._speeds(measured, best),
        }

    def turn_of(self, agreement: float) -> Turn:
        """Sets the rounding scale."""

        def turn(share: float) -> dict[str, float]:
            self.scales[agreement] = REACH * share
            self.dial.turn(REACH * share)
            return {"scale": REACH * share}

        return turn

    def turn_with_skips(self, agreement: float) -> Turn:
        """Scales the skipped sub-layers' outputs, at the rounding scale of the highest agreement.

        Raises:
            LeftOutError: no higher agreement was measured.
        """
        highest = max(self.scales, default=0.0)
        if highest <= agreement:
            raise LeftOutError(f"it needs a cell of more agreement than {agreement:g}, and none was measured")
        scale = self.scales[highest]

        def turn(share: float) -> dict[str, float]:
            self.dial.turn(scale, self.subject.skip_set, share)
            return {"scale": scale, "skipped_scale": share}

        return turn

    def draft_by(self, skip_set: SkipSet | None, gamma: int) -> None:
        """Draft `gamma` tokens from now on, without the skip set, all other sub-layers quantised.

        The copies stay: new copies would take a minute on a CPU, and would be copies of a changed target.
        """
        draft_spec = with_skips(self.format, self.subject.num_layers, skip_set) if skip_set else self.everything
        if draft_spec != self.spec.runtime.draft_spec:
            self.spec.runtime.draft_with(draft_spec)
        self.spec.plan = self._plan(draft_spec, gamma)

    def agreement(self) -> float:
        """The draft's agreement, by decoding the prompts."""
        return drafted_agreement(self.spec, [prompt[None] for prompt in self.prompts], self.effort.new_tokens)

    def ends(self) -> dict[str, float]:
        """The highest agreement that can be set (s = 0), and the agreement of the drawn weights (s = 1)."""
        found = {}
        for name, scale in (("highest", 0.0), ("as_drawn", 1.0)):
            self.dial.turn(scale)
            found[name] = self.agreement()
        return found

    def contenders(self) -> list[Contender]:
        """`model.generate`, plain decoding unpadded and padded, and the current draft."""
        return [HuggingFace(GENERATE, self.subject.model), *self._plain, Ours(DRAFTED, self.spec)]

    def _speeds(self, measured: Measurement, best: Ceiling) -> dict[str, Any]:
        """Every contender's score, and our speedup over the faster plain decoding."""
        assert self.passes is not None
        names = [contender.name for contender in measured.contenders]
        scores = measured.scores(self.spec.runtime, gamma=best.gamma)
        ratio = measured.ratio(DRAFTED, measured.baseline)
        ours = scores[measured.index(DRAFTED)]
        assert ours.stats is not None
        ideal = ideal_speedup(ours.stats.tokens_per_round, best.gamma, self.passes.of(best.draft, best.gamma))
        return {
            "tokens_per_round": ours.stats.tokens_per_round,
            "better_plain": measured.baseline,
            "speedup": ratio.to_dict(),
            "ceiling": best.speedup,
            "ideal_speedup": ideal,
            "efficiency": ratio.value / ideal,
            "distinct_tokens": distinct_share(measured.outputs[names.index(PLAIN)]),
            "draft_bytes": self.spec.stats.draft_bytes,
            "contenders": [score.to_dict() for score in scores],
            "unsteady": measured.unsteady,
        }

    @property
    def _pass_lengths(self) -> PassLengths | None:
        return self.passes.pass_lengths if self.passes else None

    @cached_property
    def _plain(self) -> list[Ours]:
        """Kept, since each compiles and captures its own passes."""
        return plain_contenders(self.subject.model, self._pass_lengths)

    def _plan(self, draft_spec: DraftSpec, gamma: int) -> Plan:
        return Plan(
            skip_set=draft_spec.skip_set, quantised=draft_spec.quantised, gamma=gamma, pass_lengths=self._pass_lengths
        )
