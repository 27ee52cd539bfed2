"""What a search may be told, and what it tells while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from selfspec.errors import InputError
from selfspec.plan import MOST_DRAFTED
from selfspec.recipe import Recipe
from selfspec.skip_set import SkipSet
from selfspec_search.sampling import Sampling

Phase = Literal["texts", "profile", "trials", "confirm", "rows"]
SamplerName = Literal["tpe", "gp", "random"]
DraftName = Literal["both", "skip", "quantised"]


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How long and how far to search, for what use, and where trials are kept.

    Args:
        trials: recipes to try in the study, by all its workers and earlier runs, pruned ones included.
        timeout: seconds after which no further trial starts; None for no limit.
        seed: of everything random in the search.
        sampler: who proposes recipes once those known to be good were tried: Optuna's TPE, Gaussian process or random
            sampling.
        draft: what drafts may do: `skip` sub-layers, which takes no memory; run them `quantised`, with a head that is
            quantised and trimmed; or `both`. What is not faster on this device is never offered.
        draft_memory: bytes that a draft's own layers may take beside the model; None for no limit. The search itself
            holds copies in every format that it tries.
        max_draft_cost: the most that a step of the draft may cost, as a share of the whole model's; None for no limit.
        start_from: recipes, or skip sets alone, to try first, such as the best of an earlier search.
        gamma_max: the longest draft by layers considered.
        lookup_max: the longest by prompt lookup, which costs no drafting; None for twice that.
        new_tokens: how many tokens the target writes after each prompt.
        sampling: how it chooses them, greedily by default.
        rows: how many rows decode together where the plan will be used.
        other_rows: other numbers of rows that it should serve: what they cost is measured, too, for the policy.
        lookup: whether prompt lookup takes part.
        memory: bytes that the replay may take beside the model; None for a share of what is there.
        confirm: how many of the best plans are decoded for real.
        confirm_texts: on how many held-out prompts, spread over the list; None for all of them.
        repeats: how often each is decoded and timed; the median counts.
        compile: search for a runtime whose passes are compiled; by default where the runtime compiles by default.
        backend: an attention backend by name; None for the first that serves.
        storage: where trials are kept: None for memory, an SQLite file, a '.journal' file, or a URL that Optuna takes.
        study_name: of the study in the storage, which is joined if it is about the same model, prompts and settings.
            None makes one name for each kind of search, so that different ones never mix.
    """

    trials: int = 200
    timeout: float | None = None
    seed: int = 0
    sampler: SamplerName = "tpe"
    draft: DraftName = "both"
    draft_memory: int | None = None
    max_draft_cost: float | None = None
    start_from: Sequence[Recipe | SkipSet] = ()
    gamma_max: int = 8
    lookup_max: int | None = None
    new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    rows: int = 1
    other_rows: Sequence[int] = ()
    lookup: bool = True
    memory: int | None = None
    confirm: int = 3
    confirm_texts: int | None = 8
    repeats: int = 3
    compile: bool | None = None
    backend: str | None = None
    storage: str | None = None
    study_name: str | None = None

    def __post_init__(self) -> None:
        least = {"trials": 1, "gamma_max": 1, "new_tokens": 2, "rows": 1, "confirm": 1, "repeats": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"{name} is {getattr(self, name)}, but it must be at least {value}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}, but it must be between 0 and {2**32 - 1}")
        if self.sampler not in get_args(SamplerName):
            raise InputError(f"sampler is '{self.sampler}', but it must be one of {', '.join(get_args(SamplerName))}")
        if self.draft not in get_args(DraftName):
            raise InputError(f"draft is '{self.draft}', but it must be one of {', '.join(get_args(DraftName))}")
        if self.draft_memory is not None and self.draft_memory < 1:
            raise InputError(f"draft_memory is {self.draft_memory}, but it must be at least 1 byte")
        if self.max_draft_cost is not None and not 0 < self.max_draft_cost <= 1:
            raise InputError(f"max_draft_cost is {self.max_draft_cost}, but it must be above 0 and at most 1")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise InputError(f"timeout is {self.timeout} seconds, but it must be more than 0; leave it out for none")
        if self.gamma_max > MOST_DRAFTED:
            raise InputError(f"gamma_max is {self.gamma_max}, but a plan's draft length is at most {MOST_DRAFTED}")
        if self.lookup_max is not None and not 1 <= self.lookup_max <= MOST_DRAFTED:
            raise InputError(f"lookup_max is {self.lookup_max}, but it must be between 1 and {MOST_DRAFTED}")
        if self.lookup_max is not None and not self.lookup:
            raise InputError(f"lookup_max is {self.lookup_max}, but prompt lookup takes no part; leave one of them out")
        if any(rows < 1 for rows in self.other_rows):
            raise InputError(f"other_rows holds {min(self.other_rows)}, but there is at least 1 row")
        if self.confirm_texts is not None and self.confirm_texts < 1:
            raise InputError(f"confirm_texts is {self.confirm_texts}, but at least one text must be decoded")

    @property
    def longest_draft(self) -> int:
        """The most tokens that a round may draft, whoever drafts them."""
        by_lookup = min(MOST_DRAFTED, self.lookup_max or 2 * self.gamma_max) if self.lookup else 0
        return max(self.gamma_max, by_lookup)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far one phase is. `best` is the best predicted speedup so far, once there is one."""

    phase: Phase
    done: int
    total: int
    best: float | None = None


OnProgress = Callable[[Progress], None]
