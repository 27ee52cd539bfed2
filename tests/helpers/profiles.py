"""Fixed profiles for tests, whose results must not depend on measured times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models import LAYERS
from selfspec_search.profile.costs import Costs
from selfspec_search.profile.profile import Profile

from selfspec.huggingface.loading import processor_name


def costs_of(*, attention: float, mlp: float, gamma_max: int = 3, **others: Any) -> Costs:
    """Costs of one row; a round takes the same time for every draft length."""
    return Costs(
        num_layers=LAYERS,
        fixed=0.001,
        layer=0.001,
        attention=attention,
        mlp=mlp,
        rounds=(0.04,) * (gamma_max + 1),
        prefill=0.01,
        compiled=False,
        **others,
    )


def profile_of(costs: Costs, **others: Any) -> Profile:
    """A profile with these costs at every context."""
    return Profile(
        device="cpu",
        processor=processor_name(),
        threads=1,
        dtype="float32",
        rows=1,
        compiled=False,
        backend="sdpa",
        num_layers=costs.num_layers,
        gamma_max=len(costs.rounds) - 1,
        versions={},
        contexts=(16,),
        costs=(costs,),
        **others,
    )


def measuring(profile: Profile) -> Callable[..., Profile]:
    """A substitute for `measure` that returns `profile`."""

    def measured(*args: object, on_cycle: Callable[[int, int], None], **kwargs: object) -> Profile:
        on_cycle(1, 1)
        return profile

    return measured
