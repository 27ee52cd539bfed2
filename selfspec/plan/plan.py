"""Plan: what the search writes and everything else reads."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError

from selfspec.errors import InputError, PlanError, excerpt, shortened
from selfspec.plan.draft_spec import DraftSpec, SubVocabulary
from selfspec.plan.lookup import MOST_DRAFTED, PromptLookup
from selfspec.plan.provenance import ModelIdentity, Provenance
from selfspec.plan.round_costs import PassLengths, RoundCosts
from selfspec.plan.schema import QuantisedField, SkipSetField, Strict, first_problem
from selfspec.plan.strict_json import parse_strictly
from selfspec.plan.sublayers import SkipSet
from selfspec.plan.version_1 import read_version_1
from selfspec.utils.files import read_bounded, write_atomically

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PLAN_FILE = "selfspec_plan.json"
PLAN_VERSION = 2
MOST_BYTES = 2**20
"""Bytes: the largest plan file that is read. Plans have some kilobytes."""
MOST_ROWS = 256
"""Round costs: the most that a plan holds, each for a number of rows."""


class Plan(Strict):
    """How to decode a model faster. A plan never changes the output.

    Attributes:
        skip_set: the sub-layers that the draft skips.
        quantised: the sub-layers that the draft runs with quantised weights; None for none. Needs memory.
        draft_vocabulary: the tokens that the draft may propose, as `SubVocabulary.code`; None for all. Needs memory.
        gamma: the draft length; with 0 the draft never runs.
        exit_threshold: the draft ends early below this probability of the drafted token; None for never.
        prompt_lookup: drafts before the layers draft; None for no prompt lookup.
        round_costs: with round costs a policy chooses drafter and draft length; without them the plan is fixed.
        pass_lengths: pads passes, also of plain decoding, to lengths that are faster.
        model: the model that the plan was made for; None if the plan fits any model with these layers.
        provenance: how the search found the plan; None for a plan made by hand.

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
    round_costs: list[RoundCosts] = Field(default_factory=list, max_length=MOST_ROWS)
    pass_lengths: PassLengths | None = None
    model: ModelIdentity | None = None
    provenance: Provenance | None = None

    def __init__(self, /, **data: Any) -> None:  # a key may be `self`
        version = data.get("selfspec_version", PLAN_VERSION)
        if not _is_version(version, PLAN_VERSION):  # checked first: another version has other keys
            raise PlanError(
                f"plan has selfspec_version {excerpt(version)}, but this selfspec reads 1 and {PLAN_VERSION}; "
                "search again, or install the selfspec that wrote it"
            )
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise PlanError(first_problem(error)) from None
        draft_spec = self.draft_spec
        if draft_spec.vocabulary is not None and not draft_spec.vocabulary.tokens:
            raise PlanError("draft_vocabulary is empty; remove the key, or search again")
        if self.model is not None:
            draft_spec.validate(self.model.num_layers)
        self._check_round_costs()

    def _check_round_costs(self) -> None:
        """Raise `PlanError` if two round costs have the same rows, or if round costs do not reach gamma."""
        if repeated := [one for one, other in pairwise(self.rows) if one == other]:
            raise PlanError(f"plan has two round_costs for {repeated[0]} rows; remove one of them, or search again")
        for costs in self.round_costs:
            if len(costs.rounds) <= self.gamma:
                raise PlanError(
                    f"plan's gamma is {self.gamma}, but its round_costs for {costs.rows} rows end at "
                    f"{len(costs.rounds) - 1} drafted tokens; remove the key 'round_costs', or search again"
                )

    @classmethod
    def none(cls, **data: Any) -> Plan:
        """A plan for plain decoding."""
        return cls(skip_set=SkipSet(), gamma=0, **data)

    @property
    def draft_spec(self) -> DraftSpec:
        """What the draft is made of."""
        vocabulary = None if self.draft_vocabulary is None else SubVocabulary(self.draft_vocabulary)
        return DraftSpec(skip_set=self.skip_set, quantised=self.quantised, vocabulary=vocabulary)

    @property
    def rows(self) -> list[int]:
        """The numbers of rows with round costs, in ascending order."""
        return sorted(costs.rows for costs in self.round_costs)

    def round_costs_for(self, rows: int) -> RoundCosts | None:
        """The round costs for `rows` rows, interpolated if needed; None outside the range of `self.rows`."""
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
        """Tokens: the largest draft length of all drafters."""
        return max(self.gamma, self.prompt_lookup.gamma if self.prompt_lookup else 0)

    def __str__(self) -> str:
        """One line: prompt lookup, draft spec and draft length."""
        parts = [str(self.prompt_lookup)] if self.prompt_lookup else []
        if self.gamma:
            threshold = f", exit below {self.exit_threshold:.3f}" if self.exit_threshold is not None else ""
            parts.append(f"{self.draft_spec}; gamma {self.gamma}{threshold}")
        return "; on a miss ".join(parts) or "do not speculate"

    def check_fits(self, config: PretrainedConfig) -> None:
        """Raise `PlanError` if the plan does not fit the model with this config."""
        self.draft_spec.validate(config.num_hidden_layers)
        if self.model is None:
            return
        given = ModelIdentity.of(config)
        if (self.model.model_type, self.model.num_layers) != (given.model_type, given.num_layers):
            raise PlanError(
                f"plan was made for {shortened(self.model.model_type)} with {self.model.num_layers} layers, but this "
                f"model is {given.model_type} with {given.num_layers}; run 'selfspec search' on this model"
            )
        if self.model.fingerprint != given.fingerprint:
            raise PlanError(
                f"plan was made for a {given.model_type} with another config "
                f"(fingerprint {shortened(self.model.fingerprint)}, this model's is {given.fingerprint}); "
                "run 'selfspec search' on this model"
            )

    @property
    def measured_in(self) -> dict[str, Any] | None:
        """The search's device, dtype and `compiled`; None for a plan made by hand."""
        if self.provenance is None:
            return None
        found = self.provenance.conditions
        return {"device": found.device, "dtype": found.dtype, "compiled": found.compiled}

    def stale_because(self, **here: Any) -> str | None:
        """The fields of `Conditions` in `here` that differ from the search's; None if no field differs.

        Under other conditions the plan's figures may not hold; its output does.
        """
        if self.provenance is None:
            return None
        found = self.provenance.conditions
        changed = [
            f"{k} {shortened(str(getattr(found, k)))}, here {v}" for k, v in here.items() if getattr(found, k) != v
        ]
        return "; ".join(changed) or None

    def to_json(self) -> str:
        unused = set() if self.round_costs else {"round_costs"}  # keeps the file short
        return self.model_dump_json(indent=2, exclude_none=True, exclude=unused) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Plan:
        data = parse_strictly(text, source)
        if not isinstance(data, dict) or "selfspec_version" not in data:
            raise PlanError(
                f"{source} is not a selfspec plan: it lacks selfspec_version; make a plan with 'selfspec search'"
            )
        try:
            return cls(**(read_version_1(data, source) if _is_version(data["selfspec_version"], 1) else data))
        except PlanError as error:
            raise PlanError(f"{source}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan to a file, completely or not at all."""
        return write_atomically(path, self.to_json())

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write the plan to `selfspec_plan.json` in a directory, such as the model's."""
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"cannot make the directory {directory}: {reason}; choose another directory") from None
        return self.save(Path(directory) / PLAN_FILE)

    @classmethod
    def from_pretrained(cls, directory_or_file: str | os.PathLike[str]) -> Plan:
        """Read a plan from a file, or from `selfspec_plan.json` in a directory."""
        if not isinstance(directory_or_file, str | os.PathLike):
            raise PlanError(
                f"expected a Plan, a plan file, or a directory with a plan, but {type(directory_or_file).__name__} "
                "was given; make a plan with Plan(skip_set=..., gamma=...), or with 'selfspec search'"
            )
        path = Path(directory_or_file)
        if os.path.isdir(path):  # `Path.is_dir` raises for some paths
            path = path / PLAN_FILE
        try:
            text = read_bounded(path, MOST_BYTES, f"plan {path}").decode("utf8")
        except FileNotFoundError:
            raise PlanError(f"no plan at {path}; make a plan with 'selfspec search MODEL --out {path}'") from None
        except InputError as error:
            raise PlanError(str(error)) from None
        except (OSError, ValueError) as error:  # text that is not UTF-8, or a path with a null character
            reason = getattr(error, "strerror", None) or error
            raise PlanError(f"plan {path} cannot be read: {reason}; give a plan that 'selfspec search' wrote") from None
        return cls.from_json(text, source=f"plan {path}")


def _is_version(value: Any, version: int) -> bool:
    return type(value) is int and value == version  # True == 1
