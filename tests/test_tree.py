"""Trees: siblings where the draft is unsure, one pass over all of them, and the model's own text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CACHE, FIRST_DROPPED, LAYERS, damped_model, prompts
from tape import TapeRecorder
from test_sampling import FALSE_ALARM, assert_follows
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import selfspec.decoding
from selfspec import Plan, PlanError, wrap
from selfspec.attention import BACKENDS, AttentionArgs
from selfspec.drafting.tree import choose_siblings
from selfspec.graphs import Graphs
from selfspec.kv_cache import Pass
from selfspec.plan import PromptLookup, Tree
from selfspec.request import Request
from selfspec.runtime import Runtime
from selfspec.sampling import Draft, Picked, Siblings, accept, pick_several
from selfspec.views import SUPPORTED_MODEL_TYPES

TREE = Tree(siblings=5, width=4)
PLAN = Plan(skip_set=FIRST_DROPPED, gamma=3, tree=TREE)
FEW = ("gemma3_text", "llama", "mistral", "qwen3_moe")
FAMILIES = [*FEW, *(pytest.param(f, marks=pytest.mark.slow) for f in sorted(SUPPORTED_MODEL_TYPES.difference(FEW)))]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 41}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return damped_model("llama", FIRST_DROPPED)


def batch(*lengths: int) -> dict[str, Tensor]:
    tokens, mask = prompts(*lengths)
    return {"input_ids": tokens, "attention_mask": mask}


# --- Greedy ---


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_model_generates_and_siblings_take_part_in_it(family: str) -> None:
    model = damped_model(family, FIRST_DROPPED)
    for given in (batch(11), batch(13, 7, 10)):
        spec = wrap(model, PLAN)
        ours = spec.generate(**given, **GREEDY)
        assert torch.equal(ours, model.generate(**given, **GREEDY))
        assert spec.stats.rescued > 0, "no sibling was ever accepted"
        assert spec.stats.accepted < spec.stats.drafted


def test_a_tree_takes_no_more_rounds_than_its_trunk(llama: PreTrainedModel) -> None:
    alone, tree = (wrap(llama, plan) for plan in (PLAN.model_copy(update={"tree": None}), PLAN))
    for spec in (alone, tree):
        spec.generate(**batch(13, 7, 10), **GREEDY)
    assert tree.stats.rounds < alone.stats.rounds
    assert tree.stats.pass_lengths[1 + 3 + 5] > 0.5 * tree.stats.passes


@pytest.mark.parametrize("plan", [PLAN, PLAN.model_copy(update={"exit_threshold": 0.02})], ids=["whole", "threshold"])
def test_with_stop_tokens_and_lookup_the_text_is_the_models(plan: Plan, llama: PreTrainedModel) -> None:
    given = batch(13, 7, 10)
    given["input_ids"][:, -3:] = given["input_ids"][:, :3]
    rows = llama.generate(**given, **GREEDY)[:, 13:]
    stop = int(rows[0, 17])
    for lookup in (None, PromptLookup(gamma=4, min_ngram=1, max_ngram=3)):
        spec = wrap(llama, plan.model_copy(update={"prompt_lookup": lookup}))
        options = GREEDY | {"eos_token_id": stop}
        assert torch.equal(spec.generate(**given, **options), llama.generate(**given, **options))
        assert spec.stats.rescued


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4, 5])
def test_a_sibling_never_leads_beyond_the_limit(new_tokens: int, llama: PreTrainedModel) -> None:
    spec, options = wrap(llama, PLAN), GREEDY | {"max_new_tokens": new_tokens}
    for seed in range(4):
        tokens, mask = prompts(11, 5, seed=seed)
        ours = spec.generate(tokens, attention_mask=mask, **options)
        assert torch.equal(ours, llama.generate(tokens, attention_mask=mask, **options))


def test_scores_are_those_of_the_accepted_path(llama: PreTrainedModel) -> None:
    given, options = batch(13, 7, 10), GREEDY | {"return_dict_in_generate": True, "output_scores": True}
    ours, theirs = wrap(llama, PLAN).generate(**given, **options), llama.generate(**given, **options)
    assert ours.stats.rescued
    for one, other in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


def test_after_a_sibling_was_accepted_every_layer_holds_the_committed_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = damped_model("gemma3_text", FIRST_DROPPED).to(torch.float64), []
    step = selfspec.decoding.step

    def checked(runtime: Runtime, drafter: Any, request: Request, stats: Any) -> Any:
        committed = step(runtime, drafter, request, stats)
        for row, (pad, end) in enumerate(zip(request.pads.tolist(), request.ends.tolist(), strict=True)):
            fresh = DynamicCache()
            model(request.sequences[row : row + 1, pad : end - 1], **{CACHE: fresh})
            for index in range(LAYERS):
                layer = fresh.layers[index]
                for ours, theirs in zip(runtime.cache.layer(index), (layer.keys, layer.values), strict=True):
                    held = ours[row, : end - 1 - pad].transpose(0, 1)
                    torch.testing.assert_close(held, theirs[0], rtol=0, atol=1e-9)
        seen.append(any(row.rescued for row in committed))
        return committed

    monkeypatch.setattr(selfspec.decoding, "step", checked)
    wrap(model, PLAN).generate(**batch(13, 7, 10), **GREEDY)
    assert any(seen[:-1])
    assert not all(seen)


@pytest.mark.parametrize("options", [GREEDY, GREEDY | {"do_sample": True, "top_k": 13}], ids=["greedy", "sampling"])
def test_captured_trees_do_what_uncaptured_ones_do(options: dict[str, Any], llama: PreTrainedModel) -> None:
    taped, plain = wrap(llama, PLAN), wrap(llama, PLAN)
    taped.runtime.graphs = Graphs(TapeRecorder())
    given = batch(11, 5, 7)
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(taped.generate(**given, **options))
    assert torch.equal(*texts)
    assert taped.stats.captured
    assert taped.stats.rescued
    if not options["do_sample"]:
        assert torch.equal(plain.generate(**given, **options), texts[0])
        assert taped.stats.history == plain.stats.history


def test_where_a_processor_looks_back_no_sibling_is_drafted_and_the_stats_say_so(llama: PreTrainedModel) -> None:
    spec, options = wrap(llama, PLAN), GREEDY | {"repetition_penalty": 1.3}
    assert torch.equal(spec.generate(**batch(13, 7), **options), llama.generate(**batch(13, 7), **options))
    assert not spec.stats.rescued
    assert any("drafts have no siblings" in path for path in spec.stats.slower_paths)


def test_a_tree_survives_its_plans_file_and_needs_a_draft_to_stand_beside() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert "5 siblings, up to 4 tokens a position" in str(PLAN)
    with pytest.raises(PlanError, match="a tree, but gamma 0"):
        Plan(skip_set=FIRST_DROPPED, gamma=0, tree=TREE)
    with pytest.raises(PlanError, match="siblings"):
        Tree(siblings=0)


# --- What they see ---


@pytest.mark.parametrize(
    ("name", "device"),
    [("sdpa", "cpu"), pytest.param("sdpa", "cuda", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("softcap", [None, 1.7])
@pytest.mark.parametrize("window", [None, 3])
def test_a_sibling_sees_its_own_path_and_no_other(
    name: str, device: str, window: int | None, softcap: float | None
) -> None:
    backend, how, s = BACKENDS[name](), AttentionArgs(scale=0.4, window=window, softcap=softcap), 128
    lengths, trunk = [5, 0], 4  # the last committed token and three drafted ones
    depths = torch.tensor([[0, 0, 2], [1, 2, 2]])
    b, t, heads, groups, dim = 2, trunk + 3, 2, 3, 16
    drawn = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(b, h, t, dim, generator=drawn) for h in (heads * groups, heads, heads))
    keys, values = (torch.randn(b, s, heads, dim, generator=drawn) for _ in range(2))
    here = [tensor.to(device) for tensor in (query, key, value, keys.clone(), values.clone())]
    cached = torch.tensor(lengths, dtype=torch.int32, device=device)
    step = Pass(cached, t, s, backend, depths=depths.to(device))
    attended = backend.attend(*here, step, how).cpu()  # b t h d
    for row, length in enumerate(lengths):
        for node in range(t):
            parent = node - 1 if node < trunk else int(depths[row, node - trunk])
            path = [*range(parent + 1), node]
            k = torch.cat([keys[row, :length], key[row, :, path].transpose(0, 1)])
            v = torch.cat([values[row, :length], value[row, :, path].transpose(0, 1)])
            k, v = (k, v) if window is None else (k[-window:], v[-window:])
            scores = query[row, :, node].view(heads, groups, dim) @ k.permute(1, 2, 0) * how.scale
            scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
            expected = (scores.softmax(dim=-1) @ v.transpose(0, 1)).reshape(heads * groups, dim)
            torch.testing.assert_close(attended[row, node], expected, rtol=0, atol=2e-5)


# --- Which siblings ---


def picked(odds: list[float], alternatives: list[int], possible: list[bool] | None = None) -> Picked:
    k = len(alternatives)
    return Picked(
        torch.tensor([9]),
        None,
        torch.tensor([alternatives]),
        torch.tensor([possible or [True] * k]),
        torch.tensor([odds]),
    )


def test_siblings_go_where_the_draft_expects_to_fail() -> None:
    steps = [picked([0.9, 0.06, 0.04], [1, 2]), picked([0.5, 0.3, 0.2], [3, 4]), picked([0.9, 0.05, 0.05], [5, 6])]
    chosen = choose_siblings(steps, torch.tensor([3]), most=3)
    # worth: 0.06, 0.04 | 0.27, 0.18 | 0.0225, 0.0225
    assert chosen.depths.tolist() == [[0, 1, 1]]
    assert chosen.tokens.tolist() == [[1, 3, 4]]
    assert chosen.valid.all()


def test_siblings_beside_what_a_row_did_not_draft_do_not_count() -> None:
    steps = [picked([0.5, 0.3, 0.2], [1, 2]), picked([0.4, 0.3, 0.3], [3, 4])]
    chosen = choose_siblings(steps, torch.tensor([1]), most=4)
    assert chosen.valid.tolist() == [[True, True, False, False]]
    assert not choose_siblings(steps, torch.tensor([0]), most=4).valid.any()


def test_alternatives_that_q_rules_out_do_not_count() -> None:
    chosen = choose_siblings([picked([0.7, 0.3, 0.0], [1, 2], [True, False])], torch.tensor([1]), most=2)
    assert chosen.valid.tolist() == [[True, False]]


def test_of_equal_odds_a_position_gets_its_alternatives_in_the_order_they_were_drawn() -> None:
    chosen = choose_siblings([picked([0.25] * 4, [7, 8, 9])], torch.tensor([1]), most=2)
    assert chosen.tokens.tolist() == [[7, 8]]


# --- Sampling: what comes out follows p. Each test would raise a false alarm with probability 1e-6, were its seed new.

V, N, ROUNDS = 7, 2, 60_013


def play(width: int, most: int, seed: int, *, truncated: bool = False) -> tuple[Draft, Any, Tensor]:
    """Rounds over a first-order toy: draft N tokens with siblings, and accept; p of every context, `v v`."""
    torch.manual_seed(seed)
    target, drafter = torch.randn(V, V), torch.randn(V, V)
    drafter = target + 1.1 * drafter
    if truncated:  # as top-k leaves it: q has fewer tokens than there are to draw
        drafter = drafter.masked_fill(drafter < drafter.topk(3).values[:, -1:], float("-inf"))
    last, steps, tokens = torch.zeros(ROUNDS, dtype=torch.long), [], []
    for _ in range(N):
        steps.append(pick_several(drafter[last], width - 1, sampling=True))
        last = steps[-1].token
        tokens.append(last)
    lengths = torch.full((ROUNDS,), N)
    siblings = choose_siblings(steps, lengths, most)
    trunk = torch.stack(tokens, dim=1)
    q = torch.stack([step.probs for step in steps], dim=1)
    draft = Draft(trunk, lengths, q, siblings)
    nodes = torch.cat([torch.zeros(ROUNDS, 1, dtype=torch.long), draft.nodes], dim=1)
    return draft, accept(draft, target[nodes], sampling=True), torch.softmax(target, dim=-1)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(("width", "most"), [(2, 2), (4, 3), (4, 6), (6, 5)])
def test_whatever_is_accepted_recovered_or_rescued_follows_p(width: int, most: int, truncated: bool) -> None:
    draft, acceptance, p = play(width, most, seed=29, truncated=truncated)
    rescue = acceptance.rescue
    trunk = acceptance.accepted - rescue.rescued.long()
    path = torch.nn.functional.pad(draft.tokens, (0, 1))
    at = trunk[:, None]
    path.scatter_(1, at, torch.where(rescue.rescued, rescue.tokens, acceptance.following)[:, None])
    after = torch.where(rescue.rescued, acceptance.following, -1)
    assert rescue.rescued.float().mean() > 0.03
    # The first token, and the second one behind each first one, if it was decided in this round.
    assert_follows(torch.bincount(path[:, 0], minlength=V)[None], p[:1])
    counts = torch.zeros(V, V, dtype=torch.long)
    second = torch.where(trunk >= 1, path[:, 1], torch.where(rescue.rescued & (trunk == 0), after, -1))
    known = second >= 0
    counts.view(-1).index_add_(0, path[known, 0] * V + second[known], torch.ones(int(known.sum()), dtype=torch.long))
    assert known.float().mean() > 0.5
    assert_follows(counts, p)


def test_what_follows_a_rescuing_sibling_follows_p_behind_it() -> None:
    _, acceptance, p = play(4, 6, seed=31)
    rescue = acceptance.rescue
    counts = torch.zeros(V, V, dtype=torch.long)
    pairs = rescue.tokens[rescue.rescued] * V + acceptance.following[rescue.rescued]
    counts.view(-1).index_add_(0, pairs, torch.ones_like(pairs))
    assert_follows(counts, p)


def test_siblings_are_drawn_without_replacement() -> None:
    torch.manual_seed(37)
    scores = torch.randn(V).expand(ROUNDS, V)
    several = pick_several(scores, 3, sampling=True)
    drawn = torch.cat([several.token[:, None], several.alternatives], dim=1)
    assert all(len(set(row)) == 4 for row in drawn[:500].tolist())
    q = torch.softmax(scores[0], dim=-1)
    second = torch.zeros(V, V, dtype=torch.long)
    pairs = drawn[:, 0] * V + drawn[:, 1]
    second.view(-1).index_add_(0, pairs, torch.ones_like(pairs))
    without = q.expand(V, V) * (1 - torch.eye(V))
    assert_follows(second, without / without.sum(dim=1, keepdim=True))


def test_a_greedy_sibling_counts_only_at_the_place_where_the_draft_failed() -> None:
    best = torch.tensor([[3, 5, 1, 1, 1, 1]])  # behind the last committed token, two drafted ones, three siblings
    scores = torch.nn.functional.one_hot(best, V).float()
    siblings = Siblings(torch.tensor([[5, 3, 5]]), torch.tensor([[0, 1, 1]]), torch.tensor([[True, True, True]]))
    taken = accept(Draft(torch.tensor([[3, 4]]), torch.tensor([2]), None, siblings), scores, sampling=False)
    assert taken.accepted.tolist() == [2]
    assert taken.rescue is not None
    assert taken.rescue.places.tolist() == [5]
    assert taken.following.tolist() == [1]
    assert taken.path(2).tolist() == [[0, 1, 5]]


@pytest.mark.slow
def test_sampled_text_of_a_real_model_has_its_distribution(llama: PreTrainedModel) -> None:
    spec, rows = wrap(llama, PLAN), 257
    tokens, _ = prompts(5)
    options = {"do_sample": True, "top_k": 4, "temperature": 0.9, "max_new_tokens": 2}
    counts = torch.zeros(211, dtype=torch.long)
    torch.manual_seed(41)
    for _ in range(23):
        out = spec.generate(tokens.repeat(rows, 1), **options)
        counts += torch.bincount(out[:, -1], minlength=211)
    first = llama(tokens).logits[0, -1] / 0.9
    p_first = torch.softmax(first.masked_fill(first < first.topk(4).values[-1], float("-inf")), dim=-1)
    expected = torch.zeros(211)
    for token in p_first.nonzero()[:, 0].tolist():
        second = llama(torch.cat([tokens, torch.tensor([[token]])], dim=1)).logits[0, -1] / 0.9
        second = second.masked_fill(second < second.topk(4).values[-1], float("-inf"))
        expected += p_first[token] * torch.softmax(second, dim=-1)
    assert FALSE_ALARM == 1e-6
    assert_follows(counts[None], expected.detach()[None])
