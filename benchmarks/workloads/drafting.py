"""Drafting: decodes a workload with every drafter in turn; counts, prices and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from selfspec_search.profile.round_costs import BatchCostProbe
from selfspec_search.replay.sampling_settings import Sampling
from torch import Tensor

from selfspec import SelfSpeculator, wrap
from selfspec.benchmark.contenders import (
    GENERATE,
    PLAIN,
    PROMPT_LOOKUP,
    Contender,
    HuggingFace,
    Ours,
    fastest,
    plain_contenders,
    prompt_lookups,
)
from selfspec.benchmark.measure import Measurement, measure
from selfspec.decoding.stats import Stats
from selfspec.huggingface.loading import Loaded
from selfspec.plan.round_costs import RoundCosts
from selfspec.utils.statistics import interleaved, speed_ratio, timed_task
from workloads.plans import Plans
from workloads.prices import Prices
from workloads.workload import Workload, endless

ADAPTIVE = "adaptive"
IN_BATCHES = (PLAIN, "lookup", "cascade", ADAPTIVE)
"""The drafters that decode batches: plain decoding, and the drafters that are fast with one row."""
PEER_DRAFTS = (3, 10, 16)
"""Tokens: draft lengths of transformers' prompt lookup, of which the fastest takes part."""


@dataclass(frozen=True, kw_only=True)
class Entrants:
    """The speculators by name, and the round costs of each number of rows."""

    specs: dict[str, SelfSpeculator]
    round_costs: dict[int, RoundCosts]

    def prices(self, name: str, rows: int) -> Prices:
        looks = name == ADAPTIVE or self.specs[name].plan.prompt_lookup is not None
        return Prices(round_costs=self.round_costs[rows], looks=looks)


def enter(loaded: Loaded, plans: Plans, rows: Sequence[int]) -> Entrants:
    """Make the speculators, and measure the round costs of each number of rows."""
    adaptive = plans.adaptive
    probe = BatchCostProbe(
        model=loaded.model,
        draft_spec=adaptive.draft_spec,
        texts=plans.texts,
        sampling=Sampling(),
        backend=None,
        compile=None,
        pass_lengths=adaptive.pass_lengths,
    )
    assert adaptive.round_costs, "the search's plan speculates"
    round_costs = {count: probe.round_costs(adaptive.round_costs[0], count) for count in rows}
    priced = adaptive.model_copy(update={"round_costs": list(round_costs.values())})
    plain = {one.name: one.spec for one in plain_contenders(loaded.model, adaptive.pass_lengths)}
    fixed = {name: wrap(loaded.model, plan, policy="fixed") for name, plan in plans.fixed.items()}
    return Entrants(specs=plain | fixed | {ADAPTIVE: wrap(loaded.model, priced)}, round_costs=round_costs)


def timed_in_turn(
    loaded: Loaded, entrants: Entrants, prompts: Sequence[Tensor], new_tokens: int, repeats: int, *, peers: bool
) -> Measurement:
    """Decode every prompt alone, with all decoders in turn."""
    options = endless(loaded)
    ours = [Ours(name, spec, options=options) for name, spec in entrants.specs.items()]
    theirs: list[Contender] = []
    if peers:
        candidates = prompt_lookups(loaded.model, draft_tokens=PEER_DRAFTS)
        for candidate in candidates:
            candidate.settings |= options
        theirs = [HuggingFace(GENERATE, loaded.model, dict(options)), fastest(candidates, prompts, new_tokens)]
    return measure([*theirs, *ours], prompts, new_tokens=new_tokens, repeats=repeats)


def one_row(
    loaded: Loaded, entrants: Entrants, workload: Workload, count: int, new_tokens: int, repeats: int, *, peers: bool
) -> dict[str, Any]:
    """A workload's counts, and priced and measured speedups over the faster plain decoding, with one row."""
    prompts = workload.prompts(loaded, count, new_tokens)
    measured = timed_in_turn(loaded, entrants, prompts, new_tokens, repeats, peers=peers)
    stats = {one.name: one.stats for one in measured.contenders if isinstance(one, Ours) and one.stats is not None}
    reference = measured.outputs[measured.index(PLAIN)]
    result = _compared(stats, {name: entrants.prices(name, 1) for name in stats})
    for name, line in result["drafters"].items():
        outputs = measured.outputs[measured.index(name)]
        line["measured"] = measured.ratio(name, measured.baseline).to_dict()
        line["tokens_per_second"] = round(measured.tokens_per_second(name), 1)
        line["differing"] = sum(not torch.equal(a, b) for a, b in zip(reference, outputs, strict=True))
    best = result["best_fixed"]
    result["adaptive_over_best_fixed_measured"] = measured.ratio(ADAPTIVE, best).to_dict()
    for peer in (GENERATE, PROMPT_LOOKUP) if peers else ():
        index = measured.index(peer)
        settings = {k: v for k, v in measured.contenders[index].settings.items() if k != "suppress_tokens"}
        result[peer] = {"against_plain": measured.ratio(peer, measured.baseline).to_dict(), "settings": settings}
        result[f"lookup_over_{peer}"] = measured.ratio("lookup", peer).to_dict()
        result[f"adaptive_over_{peer}"] = measured.ratio(ADAPTIVE, peer).to_dict()
    found = {"workload": workload.name, "rows": 1, "prompts": len(prompts), "baseline": measured.baseline}
    return found | result


def many_rows(
    loaded: Loaded, entrants: Entrants, workload: Workload, rows: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """The same for one batch. Prompts repeat if the workload has fewer than `rows`."""
    prompts, device = workload.prompts(loaded, new_tokens=new_tokens), loaded.model.device
    given = padded([prompts[row % len(prompts)] for row in range(rows)], device)
    options = {"do_sample": False, **endless(loaded)}
    stats, outputs = dict[str, Stats](), dict[str, Tensor]()

    def decode(name: str, new_tokens: int = new_tokens) -> None:
        spec = entrants.specs[name]
        outputs[name] = spec.generate(**given, **options, max_new_tokens=new_tokens)
        stats[name] = spec.stats

    for name in IN_BATCHES:
        decode(name, 8)  # warm up
    tasks = {name: timed_task(partial(decode, name), device) for name in IN_BATCHES}
    seconds = interleaved(tasks, repeats=repeats, warmup=0)
    result = _compared(stats, {name: entrants.prices(name, rows) for name in IN_BATCHES})
    tokens = np.full((2, 1), float(rows * new_tokens))
    for name, line in result["drafters"].items():
        pair = np.array([seconds[name], seconds[PLAIN]])[:, :, None]
        line["measured"] = speed_ratio(pair, tokens).to_dict()
        line["differing"] = int((outputs[name] != outputs[PLAIN]).any(dim=1).sum())
    return {"workload": workload.name, "rows": rows, "prompts": rows, **result}


def _compared(stats: dict[str, Stats], prices: dict[str, Prices]) -> dict[str, Any]:
    """Counts and priced speedups of every drafter."""
    speeds = {name: prices[name].speed(one) for name, one in stats.items()}
    best = max((name for name in speeds if name != ADAPTIVE), key=lambda name: speeds[name])
    lines = {
        name: {
            "tokens_per_round": round(one.tokens_per_round, 3),
            "acceptance_rate": round(one.acceptance_rate, 3),
            "priced": round(speeds[name] / speeds[PLAIN], 4),
            "choices": one.choices,
        }
        for name, one in stats.items()
    }
    over = round(speeds[ADAPTIVE] / speeds[best], 4)
    return {"drafters": lines, "best_fixed": best, "adaptive_over_best_fixed_priced": over}


def padded(prompts: Sequence[Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch with padding on the left."""
    width = max(map(len, prompts))
    tokens = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}


def plan_lines(specs: dict[str, SelfSpeculator]) -> dict[str, str]:
    """Every plan as text, by name."""
    return {name: str(spec.plan) for name, spec in specs.items()}
