"""Bench: one shape and one format: everything that decodes, on one set of copies, and the dial that sets agreement."""

from __future__ import annotations

from gpu_bench.agreement import drafted_agreement
from torch import Tensor

import selfspec
from quantised_bench.dial import Dial
from quantised_bench.drafts import with_skips
from quantised_bench.effort import Effort
from quantised_bench.passes import Passes
from quantised_bench.subject import Subject
from selfspec import DraftSpec, Format, Plan, Quantised, SkipSet
from selfspec.benchmark.contenders import GENERATE, PLAIN, Contender, HuggingFace, Ours
from selfspec.plan import PassLengths

PADDED, DRAFTED = "plain, padded", "drafted"
PROBING = 3
"""Draft length until one is chosen."""


class Bench:
    """Decodes one shape plainly, and with drafts in one format.

    Attributes:
        spec: ours. Its copies are made once, of the weights as they were drawn; its plan changes from cell to cell.
        scales: of the dial, by the agreement that they gave.
    """

    def __init__(self, subject: Subject, format: Format, effort: Effort) -> None:
        self.subject, self.format, self.effort = subject, format, effort
        subject.restore()
        self.everything = DraftSpec(quantised=Quantised.everything(format, subject.num_layers))
        self.passes: Passes | None = None
        self.spec = selfspec.wrap(subject.model, self._plan(self.everything, PROBING), policy="fixed")
        self.dial = Dial(subject, format, keep=subject.device.type == "cpu")
        self.prompts = subject.prompts(effort.prompts, effort.prompt_length)
        self.scales: dict[float, float] = {}
        self._plain: dict[str, Ours] = {}

    def draft_by(self, skip_set: SkipSet | None, gamma: int) -> None:
        """Draft so many tokens from now on, with all quantised but what is skipped.

        The copies stay: made anew, they would take a minute on a CPU, and be those of another target.
        """
        draft_spec = with_skips(self.format, self.subject.num_layers, skip_set) if skip_set else self.everything
        if draft_spec != self.spec.runtime.draft_spec:
            self.spec.runtime.draft_with(draft_spec)
        self.spec.plan = self._plan(draft_spec, gamma)

    def agreement(self) -> float:
        """By real decoding of the prompts."""
        return drafted_agreement(self.spec, [prompt[None] for prompt in self.prompts], self.effort.new_tokens)

    def ends(self) -> dict[str, float]:
        """Agreement at both ends: where target and draft differ by nothing but kernels and rounding to bfloat16, above
        which none can be set; and that of the weights as they were drawn, which nobody set."""
        found = {}
        for name, scale in (("highest", 0.0), ("as_drawn", 1.0)):
            self.dial.turn(scale)
            found[name] = self.agreement()
        return found

    def contenders(self) -> list[Contender]:
        """`model.generate`, plain decoding as it is and padded, and ours as it drafts now."""
        plain = [self._plainly(PLAIN), *([self._plainly(PADDED)] if self._pass_lengths else [])]
        return [HuggingFace(GENERATE, self.subject.model), *plain, Ours(DRAFTED, self.spec)]

    def distinct(self, outputs: list[Tensor]) -> float:
        """The share of different tokens in a text, averaged: text that loops has few."""
        return sum(len(text.unique()) / len(text) for text in outputs) / len(outputs)

    @property
    def _pass_lengths(self) -> PassLengths | None:
        return self.passes.pass_lengths if self.passes else None

    def _plainly(self, name: str) -> Ours:
        if name not in self._plain:  # kept: each compiles and captures passes of its own
            plan = Plan.none(pass_lengths=self._pass_lengths if name == PADDED else None)
            self._plain[name] = Ours(name, selfspec.wrap(self.subject.model, plan))
        return self._plain[name]

    def _plan(self, draft_spec: DraftSpec, gamma: int) -> Plan:
        return Plan(
            skip_set=draft_spec.skip_set, quantised=draft_spec.quantised, gamma=gamma, pass_lengths=self._pass_lengths
        )
