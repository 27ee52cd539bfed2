"""CLaSp (Chen et al., ACL 2025, arXiv:2505.24196): whole layers, chosen by a dynamic programme on cosine similarity.

The state is (layer, number of skipped layers). Each layer is kept or skipped, whichever gives the hidden state that is
more similar to the full model's (the paper's recurrence and approximation). The paper runs the programme after every
verification, on the last accepted token, which sees its own draft key and the target's keys of all other tokens.

Our choice for a static plan: the mean similarity over the last tokens of as many calibration texts as the budget
allows, each token with the paper's keys. The paper lets the user choose the number of layers; here every number is
offered, by one run of the programme.
"""

from __future__ import annotations

from collections.abc import Iterator

from methods.context import Candidate, Context, Selection, Stopwatch
from methods.programme import Way, best_ways, mean_cosine
from methods.windows import Stack, Windows
from selfspec.plan.sublayers import SkipSet

BOTH = ("attn", "mlp")


def clasp(context: Context, budget: float, seed: int) -> Selection:
    """One skip set for each number of layers; `seed` has no effect."""
    watch = Stopwatch(budget)
    for count in growing(len(context.texts)):
        ways = run_programme(context, count)
        if not watch.allows_another(times=3):
            break
    sets = [SkipSet(attn=way.skipped, mlp=way.skipped) for way in ways.values() if way.skipped]
    return Selection(offered=[Candidate(skip_set=s, ratio=len(s.attn) / context.num_layers) for s in sets])


def run_programme(context: Context, texts: int) -> dict[int, Way]:
    """The best skip set of each number of layers, on the first `texts` texts."""
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
    """1, 2, 4, ... up to `most`: numbers of texts, since a programme can be repeated but not stopped."""
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most
