"""KnapSpec (Cha et al., ICML 2026, arXiv:2602.20217): a knapsack of attention and MLP sub-layers.

Attention and MLP are decided apart. Weights are their measured latencies, in whole multiples of the smaller one; values
are cosine similarities to the full model's hidden states on the tokens accepted last; a dynamic programme keeps the
best way for every total weight. Of its results, the one with the most tokens per time is taken: (1 - a^(d+1)) / (1 - a)
tokens for d drafted ones at agreement a, over the time of d draft steps and one target pass.

Given here: our profile of this device, for the weights and for tokens per time. Left open for a plan that stays: the
tokens, which are the last ones of as many calibration texts as the budget allows; within a text the draft's keys stand
for the window's own tokens. Agreement is measured on the same tokens, for each result, by one pass of the draft. No
sub-layer is barred from skipping and no capacity is set, which leaves the method every set that its authors would find.
It takes no ratio; beside its own choice, the best set for each ratio of the time saved is offered.
"""

from __future__ import annotations

from collections.abc import Mapping

from selfspec_search.space import skip_set_of, sublayers

from rivals.clasp import growing
from rivals.context import RATIOS, Candidate, Context, Stopwatch
from rivals.programme import best_ways, mean_cosine
from rivals.windows import Stack, Windows
from selfspec.skip_set import SkipSet
from selfspec.views import draft_view

HEAVIEST = 5
"""The largest weight of a sub-layer, as multiple of the lighter kind's. This and the floor are its authors' own."""
FLOOR = 0.5
"""Ways whose states are less similar are given up."""


def knapspec(context: Context, budget: float, seed: int) -> list[Candidate]:
    """The method's own choice first, then one set for each ratio; nothing here is random."""
    watch = Stopwatch(budget)
    for count in growing(len(context.texts)):
        windows = Windows.of(context.model, context.texts[:count])
        by_saved = run_programme(context, windows)
        chosen = fastest(context, windows, by_saved)
        if not watch.allows_another(times=3):
            break
    total = sum(weights(context))
    return [
        Candidate(skip_set=chosen),
        *(Candidate(skip_set=nearest(by_saved, ratio * total), ratio=ratio) for ratio in RATIOS),
    ]


def weights(context: Context) -> list[int]:
    """What skipping each sub-layer saves, in the order in which the model runs them."""
    saved = {kind: context.costs.saved(kind) for kind in ("attn", "mlp")}
    unit = max(min(saved.values()), 1e-12)
    whole = {kind: min(HEAVIEST, max(1, round(seconds / unit))) for kind, seconds in saved.items()}
    return [whole[kind] for kind, _ in sublayers(context.num_layers)]


def run_programme(context: Context, windows: Windows) -> dict[int, SkipSet]:
    """The best set for every weight left out."""
    steps = sublayers(context.num_layers)
    stack = Stack(context.model, windows, alone=False)
    start = states = stack.embedded()
    targets = [states := stack.run(layer, [kind], states) for kind, layer in steps]
    ways = best_ways(
        start,
        targets,
        lambda step, states: stack.run(steps[step][1], [steps[step][0]], states),
        weights(context),
        similarity=mean_cosine(windows.counted),
        floor=FLOOR,
    )
    return {saved: skip_set_of([steps[step] for step in way.skipped]) for saved, way in ways.items()}


def fastest(context: Context, windows: Windows, by_saved: Mapping[int, SkipSet]) -> SkipSet:
    """The set with the most tokens per time at its best draft length."""
    view = draft_view(context.model, SkipSet())

    def tokens_per_time(skip_set: SkipSet) -> float:
        agreement = min(windows.agreement(view, skip_set), 1 - 1e-9)
        step = context.costs.draft_step(skip_set)
        return max(
            (1 - agreement ** (drafted + 1)) / (1 - agreement) / (drafted * step + seconds)
            for drafted, seconds in enumerate(context.costs.rounds)
            if drafted
        )

    return max((skip_set for skip_set in by_saved.values() if skip_set), key=tokens_per_time, default=SkipSet())


def nearest(by_saved: Mapping[int, SkipSet], saved: float) -> SkipSet:
    """The set whose weight comes nearest to `saved`."""
    return by_saved[min(by_saved, key=lambda weight: abs(weight - saved))]
