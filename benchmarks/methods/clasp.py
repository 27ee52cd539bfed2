"""CLaSp (Chen et al., ACL 2025, arXiv:2505.24196): whole layers, chosen by a dynamic programme on cosine similarity.

The state is (layer, number of layers skipped); a layer is kept or skipped, whichever leaves the hidden state more like
the full model's behind the same layer (the paper's recurrence, and its approximation). The paper runs it after every
verification on the last accepted token, whose own key is the draft's and all others the target's.

Left open for a plan that stays: on which tokens. Here it is the mean similarity over the last tokens of as many
calibration texts as the budget allows, each token under the paper's conditions. The number of layers to skip is the
user's choice in the paper; here every number is offered, and one run of the programme serves them all.
"""

from __future__ import annotations

from collections.abc import Iterator

from methods.context import Candidate, Context, Selection, Stopwatch
from methods.programme import Way, best_ways, mean_cosine
from methods.windows import Stack, Windows
from selfspec.plan.sublayers import SkipSet

BOTH = ("attn", "mlp")


def clasp(context: Context, budget: float, seed: int) -> Selection:
    """One set for each number of layers; nothing here is random."""
    watch = Stopwatch(budget)
    for count in growing(len(context.texts)):
        ways = run_programme(context, count)
        if not watch.allows_another(times=3):
            break
    sets = [SkipSet(attn=way.skipped, mlp=way.skipped) for way in ways.values() if way.skipped]
    return Selection(offered=[Candidate(skip_set=s, ratio=len(s.attn) / context.num_layers) for s in sets])


def run_programme(context: Context, texts: int) -> dict[int, Way]:
    """The best way to skip each number of layers, judged on the first `texts` texts."""
    windows = Windows.of(context.model, context.texts[:texts])
    stack = Stack(context.model, windows, alone=True)
    start = states = stack.embedded()
    targets = [states := stack.run(layer, BOTH, states) for layer in range(context.num_layers)]
    return best_ways(
        start,
        targets,
        lambda layer, states: stack.run(layer, BOTH, states),
        [1] * context.num_layers,
        similarity=mean_cosine(windows.counted),
    )


def growing(most: int) -> Iterator[int]:
    """1, 2, 4, ... up to `most`: a programme cannot be broken off, but it can be run on more and more."""
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most
