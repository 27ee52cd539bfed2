"""KnapSpec (Cha et al., ICML 2026, arXiv:2602.20217): a knapsack of attention and MLP sub-layers.

Attention and MLP are decided apart. Weights are their measured latencies, in whole multiples of the smaller one; values
are cosine similarities to the full model's hidden states on the tokens accepted last; a dynamic programme keeps the
best way for every total weight. Of its results the paper takes the one with the most tokens per time, by agreement on
the same tokens; here all of them are offered, and replay finds the best two.

Given here: our profile of this device, for the weights. Left open for a plan that stays: the tokens, which are the last
ones of as many calibration texts as the budget allows; within a text the draft's keys stand for the window's own
tokens.

The authors' code never skips the first and the last layer, and skips half of the time at most. Here no capacity is set:
lighter ways are the same without it. What may be skipped does matter, since a programme goes on with one way only for
each weight, so it is run twice, with both layers kept and with all sub-layers free.
"""

from __future__ import annotations

from collections.abc import Collection

from selfspec_search.space import skip_set_of, sublayers

from methods.clasp import growing
from methods.context import Candidate, Context, Selection, Stopwatch
from methods.programme import best_ways, mean_cosine
from methods.windows import Stack, Windows
from selfspec.plan.sublayers import SkipSet

HEAVIEST = 5
"""The largest weight of a sub-layer, as multiple of the lighter kind's. This and the floor are its authors' own."""
FLOOR = 0.5
"""Ways whose states are less similar are given up."""


def knapspec(context: Context, budget: float, seed: int) -> Selection:
    """The sets of both programmes, at every weight; nothing here is random."""
    watch = Stopwatch(budget)
    for count in growing(len(context.texts)):
        windows = Windows.of(context.model, context.texts[:count])
        found = [run_programme(context, windows, kept) for kept in (ends(context), ())]
        if not watch.allows_another(times=3):
            break
    total = sum(weights(context))
    by_set = {skip_set: saved / total for by_saved in found for saved, skip_set in by_saved.items() if skip_set}
    return Selection(offered=[Candidate(skip_set=skip_set, ratio=ratio) for skip_set, ratio in by_set.items()])


def ends(context: Context) -> list[int]:
    """The steps of the first and of the last layer."""
    last = context.num_layers - 1
    return [step for step, (_, layer) in enumerate(sublayers(context.num_layers)) if layer in (0, last)]


def weights(context: Context) -> list[int]:
    """What skipping each sub-layer saves, in the order in which the model runs them."""
    saved = {kind: context.costs.saved(kind) for kind in ("attn", "mlp")}
    unit = max(min(saved.values()), 1e-12)
    whole = {kind: min(HEAVIEST, max(1, round(seconds / unit))) for kind, seconds in saved.items()}
    return [whole[kind] for kind, _ in sublayers(context.num_layers)]


def run_programme(context: Context, windows: Windows, kept: Collection[int] = ()) -> dict[int, SkipSet]:
    """The best set for every weight left out, without the steps `kept`."""
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
        kept=kept,
        floor=FLOOR,
    )
    return {saved: skip_set_of([steps[step] for step in way.skipped]) for saved, way in ways.items()}
