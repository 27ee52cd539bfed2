"""Budget: runs the stages of a benchmark in order, and skips stages that do not fit into the time left."""

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
    """A stage cannot be measured on this machine: the stage is skipped, not failed."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The outcome of a stage."""

    name: str
    status: Status
    seconds: float = 0.0
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": round(self.seconds, 2)}


@dataclass
class Budget:
    """The time for all stages, and the outcome of each.

    Args:
        seconds: the time for all stages, from construction on.
        console: prints each stage when the stage ends; None prints nothing.
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
        """The result of `work`; None if the stage was skipped or failed, for the reason in `stages`.

        Args:
            estimate: seconds of the stage, unless a stage of the same `kind` ran before: then the longest of those.
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
            return self._note(name, "skipped", perf_counter() - start, "the device's memory is too small")
        except (SelfspecError, RuntimeError) as error:  # the other stages still run
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            _let_go(error)
            return self._note(name, "failed", perf_counter() - start, reason[:500])
        seconds = perf_counter() - start
        self._taken[kind] = max(seconds, self._taken.get(kind, 0.0))
        self._note(name, "done", seconds)
        return result

    def skip(self, name: str, reason: str) -> None:
        """Record a stage as skipped."""
        self._note(name, "skipped", reason=reason)

    def to_list(self) -> list[dict[str, Any]]:
        """The outcome of every stage, for the JSON."""
        return [stage.to_dict() for stage in self.stages]

    def _note(self, name: str, status: Status, seconds: float = 0.0, reason: str = "") -> None:
        self.stages.append(Stage(name=name, status=status, seconds=seconds, reason=reason))
        if self.console is not None:
            because = f": {reason}" if reason else ""
            self.console.print(f"{name}: {status}, {seconds:.1f} s{because}", highlight=False)


def free_memory() -> None:
    """Free unused memory. Views and their compiled code form reference cycles, which only a collection frees."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _let_go(error: BaseException) -> None:
    """Free the tensors in the frames of an error: the next stage may need their memory."""
    error.__traceback__ = None
    free_memory()
