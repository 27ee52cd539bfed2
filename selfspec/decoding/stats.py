"""Stats: counts and times of one `generate`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise, zip_longest
from time import perf_counter
from typing import Any

import torch

from selfspec.decoding.acceptance import Committed


class DeviceTimer:
    """Marks in a stretch of work, and the device's seconds between them: launching a kernel is not running it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[float | torch.cuda.Event] = []

    def mark(self) -> None:
        if self._device.type != "cuda":
            self._marks.append(perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Seconds between each mark and the next. On CUDA, all marked work must have run."""
        pairs: Any = pairwise(self._marks)
        if self._device.type == "cuda":
            return [start.elapsed_time(end) / 1000 for start, end in pairs]  # from milliseconds
        return [end - start for start, end in pairs]


@dataclass
class Stats:
    """Counts over all rows of one call; times in seconds.

    A *round* here is one row's: a verify pass over three unfinished rows counts three rounds and one pass.
    Tokens after a stop token, or beyond the limit, do not count.
    """

    rows: int = 0
    tokens: int = 0
    rounds: int = 0
    passes: int = 0
    """Verify passes."""
    drafted: int = 0
    accepted: int = 0
    reached_at: list[int] = field(default_factory=list)
    """By draft position: tokens drafted there after an accepted prefix that did not end the row."""
    accepted_at: list[int] = field(default_factory=list)
    """By draft position: accepted tokens."""
    history: list[tuple[tuple[int, int, int], ...]] = field(default_factory=list)
    """By pass: (row, drafted, accepted) of every unfinished row."""
    policy: str = ""
    """`adaptive`; or `fixed` or `none`, with the reason."""
    choices: dict[str, int] = field(default_factory=dict)
    """Passes by drafter and draft length."""
    changes: list[str] = field(default_factory=list)
    """The policy's new choices and probes: round, expected gain, and the choice before."""
    steps: int = 0
    """Passes of the draft."""
    pass_lengths: dict[int, int] = field(default_factory=dict)
    """Verify passes by their tokens in each row."""
    by_origin: dict[str, list[int]] = field(default_factory=dict)
    """Drafted and accepted tokens by drafter."""
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("prefill", "draft", "verify", "total"), 0.0)
    )
    backend: str = ""
    backend_reason: str = ""
    compiled: bool = False
    captured: bool = False
    """Whether rounds ran as CUDA graphs."""
    graph_bytes: int = 0
    """Bytes of device memory that the CUDA graphs take."""
    draft_bytes: int = 0
    """Bytes that the draft takes in addition to the model: draft weights, or a draft model's own weights and cache."""
    slower_paths: list[str] = field(default_factory=list)
    """Each reason why the call took a slower path."""

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted; 0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a row's average round commits: accepted + 1 (the papers' block efficiency)."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def agreement(self) -> list[float]:
        """By draft position: the accepted share of tokens drafted there after an accepted prefix."""
        return [a / r if r else 0.0 for a, r in zip(self.accepted_at, self.reached_at, strict=True)]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds["total"] if self.seconds["total"] else 0.0

    @property
    def other_seconds(self) -> float:
        """Seconds outside prefill, draft and verify: choosing, stopping, streaming."""
        return self.seconds["total"] - sum(self.seconds[name] for name in ("prefill", "draft", "verify"))

    def count_pass(self, rounds: Sequence[Committed]) -> None:
        """Count one verify pass, by what it committed in every row that was unfinished before the pass."""
        self.passes += 1
        self.rounds += len(rounds)
        for row in rounds:
            committed = len(row.tokens)
            self.tokens += committed
            self.drafted += row.drafted
            self.accepted += row.accepted
            if row.origin is not None and row.drafted:
                drafted, accepted = self.by_origin.get(row.origin, (0, 0))
                self.by_origin[row.origin] = [drafted + row.drafted, accepted + row.accepted]
            missing = row.drafted - len(self.reached_at)
            self.reached_at.extend([0] * missing)
            self.accepted_at.extend([0] * missing)
            for position in range(row.drafted):
                self.reached_at[position] += committed > position
                self.accepted_at[position] += row.accepted > position
        self.history.append(tuple((row.row, row.drafted, row.accepted) for row in rounds))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of a block to `seconds[name]`."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += perf_counter() - start

    def count_choice(self, label: str, steps: int, tokens: int) -> None:
        """Count a verify pass over `tokens` tokens in each row, after `steps` passes of the draft named `label`."""
        self.choices[label] = self.choices.get(label, 0) + 1
        self.steps += steps
        self.pass_lengths[tokens] = self.pass_lengths.get(tokens, 0) + 1

    def add_times(self, timer: DeviceTimer) -> None:
        """Add the seconds of a round's draft, and of its verify pass with accept, commit and rewind."""
        draft, verify = timer.seconds()
        self.seconds["draft"] += draft
        self.seconds["verify"] += verify

    def add(self, other: Stats) -> None:
        """Add another call's figures: sums of counts and times, `other`'s descriptions and bytes."""
        for name in (item.name for item in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if name in ("history", "changes"):
                both = mine + theirs
            elif name == "slower_paths":
                both = list(dict.fromkeys(mine + theirs))
            else:
                both = theirs if isinstance(theirs, str | bool) or name.endswith("_bytes") else _sum(mine, theirs)
            setattr(self, name, both)

    def to_json(self, *, indent: int | None = None) -> str:
        """`to_dict` as one JSON object."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """All figures but `history`, ready for JSON."""
        data = asdict(self)
        del data["history"]
        return data | {
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_round": self.tokens_per_round,
            "tokens_per_second": self.tokens_per_second,
            "agreement": self.agreement,
            "other_seconds": self.other_seconds,
        }

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens in {self.rounds} rounds ({self.tokens_per_round:.2f} a round), "
            f"{self.accepted} of {self.drafted} drafted accepted ({self.acceptance_rate:.0%}), "
            f"{self.tokens_per_second:.1f} tokens/s"
        )


def _sum(one: Any, other: Any) -> Any:
    """The sum of two numbers; of dictionaries and lists, entry by entry."""
    if isinstance(one, dict):
        return one | {key: _sum(one[key], value) if key in one else value for key, value in other.items()}
    if isinstance(one, list):
        return [_sum(a, b) for a, b in zip_longest(one, other, fillvalue=0)]
    return one + other
