"""Plan: what the search writes and everything else reads."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError

from selfspec.errors import PlanError
from selfspec.plan.draft_spec import DraftSpec, SubVocabulary
from selfspec.plan.lookup import MOST_DRAFTED, PromptLookup
from selfspec.plan.provenance import ModelIdentity, Provenance
from selfspec.plan.round_costs import PassLengths, RoundCosts
from selfspec.plan.schema import QuantisedField, SkipSetField, Strict, first_problem
from selfspec.plan.sublayers import SkipSet
from selfspec.plan.version_1 import read_version_1
from selfspec.utils.files import write_atomically

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PLAN_FILE = "selfspec_plan.json"
PLAN_VERSION = 2


class Plan(Strict):
    """How to draft: the skip set, the draft length gamma and the exit threshold, and prompt lookup before it, if any.

    `quantised` sub-layers (and the head, if it says so) run in weight-only quantised copies, and with a
    `draft_vocabulary` the draft proposes no other tokens: both take memory beside the model, for the draft alone.

    `round_costs` let a policy choose drafter and draft length, for the numbers of rows that they are of and those in
    between; without them, the plan is kept to. `pass_lengths` make passes longer where that is faster, also those of
    plain decoding.

    `gamma=0` means that the draft is never run; without prompt lookup either, that one does not speculate.

    A plan never changes what comes out, only how fast.

    >>> Plan(skip_set=SkipSet(attn={3}, mlp={4}), gamma=4).speculates
    True
    """

    selfspec_version: int = PLAN_VERSION
    skip_set: SkipSetField
    quantised: QuantisedField = None
    draft_vocabulary: str | None = None
    gamma: Annotated[int, Field(ge=0, le=MOST_DRAFTED)]
    exit_threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    prompt_lookup: PromptLookup | None = None
    round_costs: list[RoundCosts] = Field(default_factory=list)
    pass_lengths: PassLengths | None = None
    model: ModelIdentity | None = None
    provenance: Provenance | None = None

    def __init__(self, **data: Any) -> None:
        version = data.get("selfspec_version", PLAN_VERSION)
        if version != PLAN_VERSION:  # first, for another version's other keys are no mistake
            raise PlanError(
                f"plan has selfspec_version {version!r}, but this selfspec reads 1 and {PLAN_VERSION}; "
                "search again, or install the selfspec that wrote it"
            )
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise PlanError(first_problem(error)) from None
        draft_spec = self.draft_spec
        if draft_spec.vocabulary is not None and not draft_spec.vocabulary.tokens:
            raise PlanError("draft_vocabulary holds no token; remove the key, or search again")
        if self.model is not None:
            draft_spec.validate(self.model.num_layers)
        self._check_round_costs()

    def _check_round_costs(self) -> None:
        """Raise `PlanError` unless the round costs are of different numbers of rows and of rounds as long as gamma."""
        if repeated := [one for one, other in pairwise(self.rows) if one == other]:
            raise PlanError(f"plan has two round_costs of {repeated[0]} rows; remove one, or search again")
        for costs in self.round_costs:
            if len(costs.rounds) <= self.gamma:
                raise PlanError(
                    f"plan's gamma is {self.gamma}, but its round_costs of {costs.rows} rows end at "
                    f"{len(costs.rounds) - 1} drafted tokens; remove the key 'round_costs', or search again"
                )

    @classmethod
    def none(cls, **data: Any) -> Plan:
        """The plan that decodes plainly."""
        return cls(skip_set=SkipSet(), gamma=0, **data)

    @property
    def draft_spec(self) -> DraftSpec:
        """What the draft is made of."""
        vocabulary = None if self.draft_vocabulary is None else SubVocabulary(self.draft_vocabulary)
        return DraftSpec(skip_set=self.skip_set, quantised=self.quantised, vocabulary=vocabulary)

    @property
    def rows(self) -> list[int]:
        """The numbers of rows whose costs are known, in order."""
        return sorted(costs.rows for costs in self.round_costs)

    def round_costs_for(self, rows: int) -> RoundCosts | None:
        """What to expect of so many rows; None where only fewer or only more are known."""
        by_rows = sorted(self.round_costs, key=lambda costs: costs.rows)
        fewer = [costs for costs in by_rows if costs.rows <= rows]
        more = [costs for costs in by_rows if costs.rows >= rows]
        if not fewer or not more:
            return None
        return fewer[-1] if fewer[-1].rows == rows else fewer[-1].between(more[0], rows)

    @property
    def speculates(self) -> bool:
        return self.longest_draft > 0

    @property
    def longest_draft(self) -> int:
        """The most tokens that a round drafts, whoever drafts them."""
        return max(self.gamma, self.prompt_lookup.gamma if self.prompt_lookup else 0)

    def __str__(self) -> str:
        """In words: what is looked up, what is skipped, how far is drafted."""
        parts = [str(self.prompt_lookup)] if self.prompt_lookup else []
        if self.gamma:
            threshold = f", exit below {self.exit_threshold:.3f}" if self.exit_threshold is not None else ""
            parts.append(f"{self.draft_spec}; gamma {self.gamma}{threshold}")
        return "; on a miss ".join(parts) or "do not speculate"

    def check_fits(self, config: PretrainedConfig) -> None:
        """Raise `PlanError` if this plan was made for another model."""
        self.draft_spec.validate(config.num_hidden_layers)
        if self.model is None:
            return
        given = ModelIdentity.of(config)
        if (self.model.model_type, self.model.num_layers) != (given.model_type, given.num_layers):
            raise PlanError(
                f"plan was made for {self.model.model_type} with {self.model.num_layers} layers, but this model is "
                f"{given.model_type} with {given.num_layers}; run 'selfspec search' on this model"
            )
        if self.model.fingerprint != given.fingerprint:
            raise PlanError(
                f"plan was made for a {given.model_type} with another config (fingerprint {self.model.fingerprint}, "
                f"this model's is {given.fingerprint}); run 'selfspec search' on this model"
            )

    @property
    def measured_in(self) -> dict[str, Any] | None:
        """Device, dtype and `compiled` of the search; None for a plan made by hand."""
        if self.provenance is None:
            return None
        found = self.provenance.conditions
        return {"device": found.device, "dtype": found.dtype, "compiled": found.compiled}

    def stale_because(self, **here: Any) -> str | None:
        """Why this plan's figures (never its output) may not hold here; None if they were found in such conditions.

        `here` are fields of `Conditions`.
        """
        if self.provenance is None:
            return None
        found = self.provenance.conditions
        changed = [f"{k} {getattr(found, k)}, here {v}" for k, v in here.items() if getattr(found, k) != v]
        return "; ".join(changed) or None

    def to_json(self) -> str:
        unused = set() if self.round_costs else {"round_costs"}  # what is not used need not be read
        return self.model_dump_json(indent=2, exclude_none=True, exclude=unused) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Plan:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"{source} is not JSON ({error.msg} at line {error.lineno}); write it again") from None
        if not isinstance(data, dict) or "selfspec_version" not in data:
            raise PlanError(
                f"{source} is not a selfspec plan: it has no selfspec_version; make one with 'selfspec search'"
            )
        try:
            return cls(**(read_version_1(data, source) if data["selfspec_version"] == 1 else data))
        except PlanError as error:
            raise PlanError(f"{source}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan to a file, whole or not at all."""
        return write_atomically(path, self.to_json())

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write the plan beside a model's `config.json`, as `selfspec_plan.json`."""
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(f"cannot make the directory {directory}: {error.strerror or error}") from None
        return self.save(Path(directory) / PLAN_FILE)

    @classmethod
    def from_pretrained(cls, directory_or_file: str | os.PathLike[str]) -> Plan:
        """Read a plan from a file, or from `selfspec_plan.json` in a directory."""
        if not isinstance(directory_or_file, str | os.PathLike):
            raise PlanError(
                f"a plan is a Plan, a plan file, or a directory that holds one, but {type(directory_or_file).__name__} "
                "was given; make one with Plan(skip_set=..., gamma=...), or with 'selfspec search'"
            )
        path = Path(directory_or_file)
        if os.path.isdir(path):  # which answers no where `Path.is_dir` raises
            path = path / PLAN_FILE
        try:
            text = path.read_text("utf8")
        except FileNotFoundError:
            raise PlanError(f"no plan at {path}; make one with 'selfspec search MODEL --out {path}'") from None
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"plan {path} cannot be read: {error}") from None
        return cls.from_json(text, source=f"plan {path}")
