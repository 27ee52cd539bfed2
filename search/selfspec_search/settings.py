"""SearchSettings, and the progress of a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from selfspec.decode_options import DRAFT_MEMORY, Backend, Compile
from selfspec.plan.draft_spec import MOST_DRAFTED, DraftSpec
from selfspec.plan.sublayers import SkipSet
from selfspec.utils.settings import Described, SettingError, check_settings
from selfspec_search.replay.sampling_settings import Sampling

Phase = Literal["texts", "profile", "sensitivity", "trials", "confirm", "rows"]
SamplerName = Literal["tpe", "gp", "random"]
DraftName = Literal["both", "skip", "quantised"]

Trials = Annotated[
    int, Described("Drafts to try in the study, by all workers and earlier runs, pruned ones included.", least=1)
]
Seed = Annotated[int, Described("Seed of everything random.", least=0, most=2**32 - 1)]


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How long and how far to search, for what use, and where trials are kept.

    The command line makes an option of most settings, with the same help text, default and bounds.
    """

    trials: Trials = 200
    budget: Annotated[
        float | None,
        Described(
            "Time of the whole search, such as 90s, 10m or 2h, shared by all its phases. By default the command line "
            "gives 15m, and the library has no limit.",
            above=0,
            is_duration=True,
        ),
    ] = None
    timeout: Annotated[
        float | None, Described("Start no further trial after this many seconds.", above=0, unit="seconds")
    ] = None
    seed: Seed = 0
    sampler: Annotated[
        SamplerName,
        Described("Who proposes drafts once known good drafts were tried: Optuna's TPE, GP or random sampler."),
    ] = "tpe"
    draft: Annotated[
        DraftName,
        Described(
            "What drafts may do: skip sub-layers, run quantised copies with a trimmed head, or both. What is not "
            "faster on this device is never offered."
        ),
    ] = "both"
    draft_memory: Annotated[int | None, replace(DRAFT_MEMORY, least=1)] = None
    max_draft_cost: Annotated[
        float | None,
        Described("The most that a step of the draft may cost, as a share of the model's.", above=0, most=1),
    ] = None
    start_from: Annotated[
        Sequence[DraftSpec | SkipSet],
        Described("Draft specs or skip sets to try first, such as the best of an earlier search."),
    ] = ()
    lookup: Annotated[bool, Described("Let prompt lookup take part.")] = True
    gamma_max: Annotated[
        int, Described("The longest draft by layers to consider, in tokens.", least=1, most=MOST_DRAFTED)
    ] = 8
    lookup_max: Annotated[
        int | None,
        Described(
            "The longest draft by prompt lookup, in tokens; by default twice that of layers.",
            least=1,
            most=MOST_DRAFTED,
        ),
    ] = None
    new_tokens: Annotated[int, Described("Tokens to write after each prompt.", least=2)] = 128
    sampling: Annotated[Sampling, Described("How the target chooses its tokens; greedily by default.")] = field(
        default_factory=Sampling
    )
    rows: Annotated[int, Described("How many rows will decode together.", least=1)] = 1
    more_rows: Annotated[
        Sequence[int],
        Described("A further number of rows that the plan serves: its round costs are measured. May be repeated."),
    ] = ()
    memory: Annotated[
        int | None,
        Described(
            "Memory of the replay in addition to the model, such as 512M or 4G; by default a share of the free memory.",
            is_size=True,
        ),
    ] = None
    confirm: Annotated[int, Described("How many of the best plans are decoded for real.", least=1)] = 3
    confirm_texts: Annotated[
        int | None,
        Described("Held-out prompts to decode by each of the best plans, spread over the list; None for all.", least=1),
    ] = 8
    repeats: Annotated[
        int, Described("How often each of the best plans is decoded and timed; the median counts.", least=1)
    ] = 3
    compile: Compile = None
    backend: Backend = None
    storage: Annotated[
        str | None,
        Described("Where trials are kept: an SQLite file, a .journal file, or a URL for Optuna; None for memory."),
    ] = None
    study_name: Annotated[
        str | None,
        Described(
            "The study in the storage, which is joined if it is about the same model, prompts and settings. By default "
            "a name is made from all of these, so that different searches never mix."
        ),
    ] = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.lookup_max is not None and not self.lookup:
            reason = f"is {self.lookup_max}, but prompt lookup takes no part; leave one of them out"
            raise SettingError("lookup_max", reason)
        if any(rows < 1 for rows in self.more_rows):
            raise SettingError("more_rows", f"holds {min(self.more_rows)}, but there is at least 1 row")

    @property
    def longest_draft(self) -> int:
        """The most tokens that a round may draft, whoever drafts them."""
        by_lookup = min(MOST_DRAFTED, self.lookup_max or 2 * self.gamma_max) if self.lookup else 0
        return max(self.gamma_max, by_lookup)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far one phase is. `best` is the best predicted speedup so far, once there is one.

    `left` is what is left of the search's budget in seconds; None without a budget.
    """

    phase: Phase
    done: int
    total: int
    best: float | None = None
    left: float | None = None


OnProgress = Callable[[Progress], None]
