"""Plan: what the search writes and everything else reads."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from selfspec.errors import PlanError
from selfspec.recipe import Quantised, Recipe, SubVocabulary
from selfspec.skip_set import SkipSet

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PLAN_FILE = "selfspec_plan.json"
PLAN_VERSION = 1
MOST_DRAFTED = 64
"""The longest draft that a plan may ask for."""
MOST_SIBLINGS = 16
"""The most alternatives to drafted tokens."""

LONGEST_SHOWN = 100
"""Characters of what was given that a message repeats."""

# Keys of a config that do not change what the model computes.
_INCIDENTAL = frozenset(
    {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class"}
)
_INCIDENTAL_PREFIXES = ("_attn_implementation", "output_", "return_dict")


def _to_skip_set(value: Any) -> Any:
    return value if isinstance(value, SkipSet) else SkipSet.from_dict(value)


_SkipSetField = Annotated[
    SkipSet, BeforeValidator(_to_skip_set), PlainSerializer(SkipSet.to_dict, return_type=dict[str, list[int]])
]


def _to_quantised(value: Any) -> Any:
    return value if isinstance(value, Quantised) or value is None else Quantised.from_dict(value)


_QuantisedField = Annotated[
    Quantised | None,
    BeforeValidator(_to_quantised),
    PlainSerializer(lambda value: value and value.to_dict(), return_type=dict[str, Any] | None),
]


class _Strict(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, strict=True, ser_json_inf_nan="constants"
    )


class _Setting(_Strict):
    """What users make by hand, too."""

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise PlanError(_first_problem(error)) from None


class ModelIdentity(_Strict):
    """Which model a plan was made for. The fingerprint is a hash of its config."""

    model_type: str
    num_layers: int
    fingerprint: str

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelIdentity:
        return cls(
            model_type=config.model_type, num_layers=config.num_hidden_layers, fingerprint=config_fingerprint(config)
        )


class Conditions(_Strict):
    """Where and how the search ran: another device, dtype or sampling makes its figures (not its output) stale.

    `context` is how many tokens a row had cached on average while it was decoded.
    """

    device: str
    dtype: str
    rows: int = 1
    context: int | None = None
    sampling: dict[str, Any] = {}
    compiled: bool = False
    versions: dict[str, str] = {}

    @property
    def do_sample(self) -> bool:
        """Whether the search was for sampling, and not for greedy decoding."""
        return bool(self.sampling.get("do_sample", False))


class Figures(_Strict):
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
    agreement: list[float] = []
    interval: list[float] = []
    spread: list[float] = []


class Provenance(_Strict):
    """What the search saw: predicted and measured figures side by side.

    `errors` are measured over predicted on the texts that were decoded, less 1; of the best contender where plain
    decoding won. `study` is the study's name in its storage.
    """

    conditions: Conditions
    seed: int
    trials: int
    study: str | None = None
    settings: dict[str, Any] = {}
    predicted: Figures | None = None
    predicted_on_held_out: Figures | None = None
    measured: Figures | None = None
    errors: dict[str, float] = {}
    profile: dict[str, Any] = {}


Share = Annotated[float, Field(ge=0, le=1)]
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Outlook(_Strict):
    """What the search expects of drafts of every kind and length, on its device: what a policy starts from.

    Args:
        rows: how many are decoded together; all figures are for all of them.
        draft_step: seconds to draft one token in every row.
        rounds: seconds of all but drafting in a round over 0, 1, ... drafted tokens.
        agreement: of drafts by layers, by draft position.
        looking: seconds of prompt lookup in a round.
        matches: of prompt lookup, by the length of its match (1, 2, 3 or 4, 5 to 7, 8 or more last tokens): how often
            the first looked-up token is right, and how often a later one is where all before it were; empty where
            prompt lookup takes no part.
        branching: seconds that siblings add to a round, beside their places in its pass.
        rescued: how often a sibling is right where the drafted tokens go wrong.
    """

    rows: Annotated[int, Field(ge=1)]
    draft_step: Cost
    rounds: Annotated[
        list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=2, max_length=MOST_DRAFTED + 1)
    ]
    agreement: Annotated[list[Share], Field(min_length=1)]
    looking: Cost = 0.0
    matches: Annotated[list[Annotated[list[Share], Field(min_length=2, max_length=2)]], Field(max_length=5)] = []
    branching: Cost = 0.0
    rescued: Share = 0.0

    @model_validator(mode="after")
    def _knows_every_match(self) -> Self:
        if len(self.matches) not in (0, 5):
            raise ValueError("matches are of five lengths, or none")
        return self

    def between(self, other: Outlook, rows: int) -> Outlook:
        """What so many rows cost, between the costs of fewer and of more."""
        weight = (rows - self.rows) / (other.rows - self.rows)
        changed: dict[str, Any] = {"rows": rows}
        for name in ("draft_step", "looking", "branching"):
            changed[name] = _between(getattr(self, name), getattr(other, name), weight)
        pairs = zip(self.rounds, other.rounds, strict=False)
        return self.model_copy(update=changed | {"rounds": [_between(*pair, weight) for pair in pairs]})


def _between(one: float, other: float, weight: float) -> float:
    return one + (other - one) * weight


class Padding(_Strict):
    """Lengths of passes that are faster than shorter ones, as measured for so many rows on the search's device.

    Args:
        rows: how many are decoded together.
        target: how many tokens a pass of the full model over 1, 2, ... tokens is made of; longer ones of what they are.
        draft: how many tokens a draft's pass over one token is made of.
    """

    rows: Annotated[int, Field(ge=1)]
    target: list[Annotated[int, Field(ge=1, le=2 * MOST_DRAFTED)]]
    draft: Annotated[int, Field(ge=1, le=2 * MOST_DRAFTED)] = 1

    @model_validator(mode="after")
    def _never_cuts(self) -> Self:
        if any(padded < t for t, padded in enumerate(self.target, start=1)):
            raise ValueError("a pass cannot be padded to fewer tokens than it has")
        return self

    def of_target(self, t: int) -> int:
        return self.target[t - 1] if t <= len(self.target) else t

    @property
    def most(self) -> int:
        """How many tokens it may add to a pass."""
        return max(self.draft - 1, *(padded - t for t, padded in enumerate(self.target, start=1)), 0)


class PromptLookup(_Setting):
    """Prompt lookup: draft up to `gamma` tokens that followed an earlier match of `min_ngram` last tokens or more.

    The longest match counts, of up to `max_ngram` tokens. `checked`: the draft checks them before the target does.
    """

    gamma: Annotated[int, Field(ge=1, le=MOST_DRAFTED)]
    min_ngram: Annotated[int, Field(ge=1, le=64)] = 2
    max_ngram: Annotated[int, Field(ge=1, le=64)] = 8
    checked: bool = False

    def __init__(self, **data: Any) -> None:
        super().__init__(**data)
        if self.min_ngram > self.max_ngram:
            raise PlanError(
                f"prompt lookup's min_ngram is {self.min_ngram}, but it must be at most max_ngram, {self.max_ngram}"
            )

    def __str__(self) -> str:
        checked = ", checked by the draft" if self.checked else ""
        return f"lookup of {self.min_ngram} to {self.max_ngram} tokens, {self.gamma} drafted{checked}"


class Tree(_Setting):
    """Draft alternatives, too: `siblings` of them in each row, beside the drafted tokens of which the draft is least
    sure; at one position it tries `width` tokens at most, the drafted one included.
    """

    siblings: Annotated[int, Field(ge=1, le=MOST_SIBLINGS)]
    width: Annotated[int, Field(ge=2, le=MOST_SIBLINGS + 1)] = 3

    def __str__(self) -> str:
        return f"{self.siblings} sibling{'s' if self.siblings > 1 else ''}, up to {self.width} tokens a position"


class Plan(_Strict):
    """How to draft: the skip set, the draft length gamma and the exit threshold, and prompt lookup before it, if any.

    `quantised` sub-layers (and the head, if it says so) run in weight-only quantised copies, and with a
    `draft_vocabulary` the draft proposes no other tokens: both take memory beside the model, for the draft alone.

    With a `tree` the draft holds alternatives to the tokens of which it is least sure, checked in the same pass.

    With `resume`, verification goes on from the draft's own states at the first layer of which anything is skipped or
    quantised. Worth it only where a pass over many tokens takes much longer than one over one.

    `outlook` lets a policy choose who drafts and how far, by what each costs; without it, the plan is kept to.
    `other_rows` says what other numbers of rows cost; between two of them, costs lie in between. `padding`
    makes passes longer where that is faster, also those of plain decoding.

    `gamma=0` means that the draft is never run; without prompt lookup either, that one does not speculate.

    A plan never changes what comes out, only how fast.

    >>> Plan(skip_set=SkipSet(attn={3}, mlp={4}), gamma=4).speculates
    True
    """

    selfspec_version: int = PLAN_VERSION
    skip_set: _SkipSetField
    quantised: _QuantisedField = None
    draft_vocabulary: str | None = None
    gamma: Annotated[int, Field(ge=0, le=MOST_DRAFTED)]
    exit_threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    prompt_lookup: PromptLookup | None = None
    tree: Tree | None = None
    resume: bool = False
    outlook: Outlook | None = None
    other_rows: list[Outlook] = []
    padding: Padding | None = None
    model: ModelIdentity | None = None
    provenance: Provenance | None = None

    def __init__(self, **data: Any) -> None:
        version = data.get("selfspec_version", PLAN_VERSION)
        if version != PLAN_VERSION:  # first, for another version's other keys are no mistake
            raise PlanError(
                f"plan has selfspec_version {version!r}, but this selfspec reads {PLAN_VERSION}; "
                "search again, or install the selfspec that wrote it"
            )
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise PlanError(_first_problem(error)) from None
        recipe = self.recipe
        if recipe.vocabulary is not None and not recipe.vocabulary.tokens:
            raise PlanError("draft_vocabulary holds no token; remove the key, or search again")
        if self.model is not None:
            recipe.validate(self.model.num_layers)
        checked = self.prompt_lookup is not None and self.prompt_lookup.checked
        if checked and (not self.gamma or self.tree is not None or self.exit_threshold is not None):
            raise PlanError(
                "prompt_lookup is to be checked by the draft, which needs a gamma, and neither tree nor "
                "exit_threshold; change the plan, or leave 'checked' out"
            )
        if self.tree is not None and not self.gamma:
            raise PlanError("plan has a tree, but gamma 0: siblings stand beside drafted tokens; give a gamma")
        for key, outlook in [("outlook", self.outlook), *(("other_rows", one) for one in self.other_rows)]:
            if outlook is not None and len(outlook.rounds) <= self.gamma:
                raise PlanError(
                    f"plan's gamma is {self.gamma}, but its {key} has costs of rounds over up to "
                    f"{len(outlook.rounds) - 1} drafted tokens; remove the key '{key}', or search again"
                )

    @classmethod
    def none(cls, **data: Any) -> Plan:
        """The plan that decodes plainly."""
        return cls(skip_set=SkipSet(), gamma=0, **data)

    @property
    def recipe(self) -> Recipe:
        """What the draft is made of."""
        vocabulary = None if self.draft_vocabulary is None else SubVocabulary(self.draft_vocabulary)
        return Recipe(skip_set=self.skip_set, quantised=self.quantised, vocabulary=vocabulary)

    @property
    def rows(self) -> list[int]:
        """The numbers of rows whose costs are known, in order."""
        return sorted(outlook.rows for outlook in self._outlooks)

    @property
    def _outlooks(self) -> list[Outlook]:
        return [] if self.outlook is None else sorted([self.outlook, *self.other_rows], key=lambda one: one.rows)

    def outlook_for(self, rows: int) -> Outlook | None:
        """What to expect of so many rows; None where only fewer or only more are known."""
        fewer = [outlook for outlook in self._outlooks if outlook.rows <= rows]
        more = [outlook for outlook in self._outlooks if outlook.rows >= rows]
        if not fewer or not more:
            return None
        return fewer[-1] if fewer[-1].rows == rows else fewer[-1].between(more[0], rows)

    @property
    def speculates(self) -> bool:
        return self.longest_draft > 0

    @property
    def siblings(self) -> int:
        """How many alternatives a round drafts beside that."""
        return self.tree.siblings if self.tree is not None else 0

    @property
    def longest_draft(self) -> int:
        """The most tokens that a round drafts, whoever drafts them, siblings apart."""
        lookup = self.prompt_lookup
        return max(self.gamma, lookup.gamma + lookup.checked if lookup else 0)

    def __str__(self) -> str:
        """In words: what is looked up, what is skipped, how far is drafted."""
        parts = [str(self.prompt_lookup)] if self.prompt_lookup else []
        if self.gamma:
            threshold = f", exit below {self.exit_threshold:.3f}" if self.exit_threshold is not None else ""
            siblings = f", {self.tree}" if self.tree is not None else ""
            resumed = ", resumed" if self.resume else ""
            parts.append(f"{self.recipe}; gamma {self.gamma}{threshold}{siblings}{resumed}")
        return "; on a miss ".join(parts) or "do not speculate"

    def check_fits(self, config: PretrainedConfig) -> None:
        """Raise `PlanError` if this plan was made for another model."""
        self.recipe.validate(config.num_hidden_layers)
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
        # What is not used need not be read.
        unused = {name for name in ("resume", "other_rows") if not getattr(self, name)}
        return self.model_dump_json(indent=2, exclude_none=True, exclude=unused) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Plan:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"{source} is not JSON ({error.msg} at line {error.lineno}); write it anew") from None
        if not isinstance(data, dict) or "selfspec_version" not in data:
            raise PlanError(
                f"{source} is not a selfspec plan: it has no selfspec_version; make one with 'selfspec search'"
            )
        try:
            return cls(**data)
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


def config_fingerprint(config: PretrainedConfig) -> str:
    """Sixteen hex digits that change with anything in the config that changes what the model computes.

    Only settings that differ from the family's defaults count: a release of transformers that adds a setting must not
    turn plans away.
    """
    essential = {
        key: value
        for key, value in config.to_dict().items()
        if key not in _INCIDENTAL
        and not key.startswith(_INCIDENTAL_PREFIXES)
        and (not hasattr(type(config), key) or getattr(type(config), key) != value)
    }
    return hashlib.sha256(json.dumps(essential, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_atomically(path: str | os.PathLike[str], text: str) -> Path:
    """Write to a temporary name beside `path`, then rename: readers see the old file or the new, never half of one."""
    path, temporary = Path(path), None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
        temporary.chmod(0o644)  # NamedTemporaryFile makes it private; a plan is meant to be shared
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise PlanError(
            f"cannot write {path}: {error.strerror or error}; choose a directory that is writable"
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "plan"
    if problem["type"] == "extra_forbidden":
        return f"plan has an unknown key '{where}'; remove it, or search again"
    if problem["type"] == "missing":
        return f"plan lacks the key '{where}'; search again"
    message = problem["msg"].removeprefix("Value error, ")
    return f"plan key '{where}': {message} (given: {shorten(repr(problem['input']), LONGEST_SHOWN)})"
