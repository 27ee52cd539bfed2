"""Plans: the best plan of each fixed drafter by a search, and the plan of the adaptive policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.prompts import texts_of
from selfspec_search import SearchSettings, search
from selfspec_search.profile.profile import Profile
from selfspec_search.profile.round_costs import match_shares, strip_trailing_zeros
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.rounds import Drafting, agreement
from selfspec_search.replay.table import Table
from selfspec_search.replay.texts import Text
from selfspec_search.study.objective import Prices, predict, simplest, ways_to_draft
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.plan import Plan
from selfspec.plan.round_costs import RoundCosts
from selfspec.runtime.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Plans:
    """Fixed plans that speculate by name, the adaptive plan, and the texts and the profile of the search."""

    fixed: dict[str, Plan]
    adaptive: Plan
    texts: Sequence[Text]
    profile: Profile


def find_plans(
    model: PreTrainedModel, calibration: Sequence[Tensor], held_out: Sequence[Tensor], settings: SearchSettings
) -> Plans:
    """Search for the adaptive plan, and find the best settings of each fixed drafter with the search's draft."""
    found = search(model, calibration, held_out, settings)
    texts = texts_of(Runtime(model), calibration, settings.new_tokens)
    prices = Prices.of(found.profile, texts).with_lookups(texts)
    drafting = next(one.prediction for one in found.confirmed if one.prediction.drafting.gamma)
    table = Replay(model, texts, settings.gamma_max).run(drafting.draft_spec)
    ways = ways_to_draft(table, prices)
    layers = simplest(predict(table, prices, drafting.draft_spec, ways))
    both = [replace(way, lookup=lookup) for lookup in prices.lookups for way in ways]
    cascade = simplest(predict(table, prices, drafting.draft_spec, both))
    lookup = prices.best_lookup(texts)
    assert lookup is not None
    fixed = {
        "lookup": lookup.plan,
        "layers": layers.plan,
        "cascade": cascade.plan,
    }
    adaptive = found.plan
    if not adaptive.round_costs or not adaptive.gamma:  # plain decoding won, or the plan cannot adapt
        adaptive = cascade.plan.model_copy(
            update={"round_costs": [_round_costs(found.profile, drafting.draft_spec, table, texts)]}
        )
    pass_lengths = found.profile.pass_lengths
    return Plans(
        fixed={name: plan.model_copy(update={"pass_lengths": pass_lengths}) for name, plan in fixed.items()},
        adaptive=adaptive.model_copy(update={"pass_lengths": pass_lengths}),
        texts=texts,
        profile=found.profile,
    )


def _round_costs(profile: Profile, draft_spec: DraftSpec, table: Table, texts: Sequence[Text]) -> RoundCosts:
    """Round costs from the search's profile and replay."""
    prices = Prices.of(profile, texts)
    assert prices.lookup is not None
    return RoundCosts(
        rows=profile.rows,
        draft_step=prices.costs.draft_step(draft_spec),
        rounds=list(prices.costs.rounds),
        agreement=strip_trailing_zeros(agreement(table, Drafting(table.depths))),
        lookup=prices.costs.lookup,
        matches=match_shares(texts, prices.lookup, profile.gamma_max),
    )
