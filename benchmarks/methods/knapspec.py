"""KnapSpec (Cha et al., ICML 2026, arXiv:2602.20217): a knapsack of attention and MLP sub-layers.

Attention and MLP are decided separately. Weights are measured latencies, in whole multiples of the smaller latency.
Values are cosine similarities to the full model's hidden states on the last accepted tokens. A dynamic programme keeps
the best skip set of every total weight. The paper takes the skip set with the most tokens per time, by agreement on the
same tokens; here all skip sets are offered, and replay finds the best two.

Weights come from our profile of this device. Our choice for a static plan: the last tokens of as many calibration texts
as the budget allows. The tokens of a window see each other's draft keys.

The authors' code never skips the first and the last layer, and skips at most half of the time. Here no capacity is set,
since lighter skip sets do not depend on the capacity. The programme runs twice, with the first and the last layer kept
and with all sub-layers free, since the programme continues only one skip set for each weight.
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
"""The largest weight of a sub-layer, as a multiple of the smaller latency; from the authors' code, as is `FLOOR`."""
FLOOR = 0.5
"""The least similarity of hidden states at which a skip set is continued."""


def knapspec(context: Context, budget: float, seed: int) -> Selection:
    """The skip sets of both programmes, at every weight; `seed` has no effect."""
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
    """The steps of the first and the last layer."""
    last = context.num_layers - 1
    return [step for step, (_, layer) in enumerate(sublayers(context.num_layers)) if layer in (0, last)]


def weights(context: Context) -> list[int]:
    """The weight of each sub-layer, in the order in which the model runs them."""
    saved = {kind: context.costs.saved(kind) for kind in ("attn", "mlp")}
    unit = max(min(saved.values()), 1e-12)
    whole = {kind: min(HEAVIEST, max(1, round(seconds / unit))) for kind, seconds in saved.items()}
    return [whole[kind] for kind, _ in sublayers(context.num_layers)]


def run_programme(context: Context, windows: Windows, kept: Collection[int] = ()) -> dict[int, SkipSet]:
    """The best skip set of every skipped weight; the steps `kept` are never skipped."""
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
