"""Budget: the stages of a run, in their order, each left out where what remains of the time is not enough for it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console

from selfspec.errors import SelfspecError

T = TypeVar("T")
Status = Literal["done", "skipped", "failed"]


class LeftOutError(SelfspecError):
    """Why a stage cannot be measured here, which is no fault."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What became of one stage."""

    name: str
    status: Status
    seconds: float = 0.0
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": round(self.seconds, 2)}


@dataclass
class Budget:
    """Seconds for all stages together, and what became of them.

    Args:
        seconds: what there is from now on.
        console: prints every stage as soon as it has ended; None for silence.
    """

    seconds: float
    console: Console | None = None
    stages: list[Stage] = field(default_factory=list)
    _taken: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = perf_counter()

    @property
    def left(self) -> float:
        return self.seconds - (perf_counter() - self._start)

    def run(self, name: str, estimate: float, work: Callable[[], T], *, kind: str | None = None) -> T | None:
        """What `work` returns; None where it was left out or failed, and then `stages` says why.

        Args:
            estimate: seconds that it may take; once stages of its `kind` were measured, the longest of them counts.
        """
        expected, kind = self._taken.get(kind or name, estimate), kind or name
        if expected > self.left:
            needs = f"it may take {expected:.0f} s, and {max(0.0, self.left):.0f} s of {self.seconds:.0f} s are left"
            return self._note(name, "skipped", reason=f"{needs}; give a longer --budget")
        start = perf_counter()
        try:
            result = work()
        except LeftOutError as error:
            return self._note(name, "skipped", perf_counter() - start, str(error))
        except torch.OutOfMemoryError as error:
            _let_go(error)
            return self._note(name, "skipped", perf_counter() - start, "the device's memory is too small for it")
        except (SelfspecError, RuntimeError) as error:  # one stage that fails must not cost the others' figures
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            _let_go(error)
            return self._note(name, "failed", perf_counter() - start, reason[:500])
        seconds = perf_counter() - start
        self._taken[kind] = max(seconds, self._taken.get(kind, 0.0))
        self._note(name, "done", seconds)
        return result

    def skip(self, name: str, reason: str) -> None:
        """Leave a stage out."""
        self._note(name, "skipped", reason=reason)

    def to_list(self) -> list[dict[str, Any]]:
        """What became of every stage, for the JSON."""
        return [stage.to_dict() for stage in self.stages]

    def _note(self, name: str, status: Status, seconds: float = 0.0, reason: str = "") -> None:
        self.stages.append(Stage(name=name, status=status, seconds=seconds, reason=reason))
        if self.console is not None:
            because = f": {reason}" if reason else ""
            self.console.print(f"{name}: {status}, {seconds:.1f} s{because}", highlight=False)


def free_memory() -> None:
    """Give memory back. Views and what they compiled refer to each other, so only a collection finds them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _let_go(error: BaseException) -> None:
    """Free what the frames of an error hold: the next stage may need the memory."""
    error.__traceback__ = None
    free_memory()
