"""Which drafted tokens the target accepts, and the token that follows them.

*Accepted* are drafted tokens that passed; the *recovered* token is the target's where the first one failed; the *bonus*
token is the extra one when all passed. p is the target's distribution, q the draft's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Siblings:
    """Alternatives to drafted tokens, `m` in each row: the leaves of a tree whose trunk is the draft.

    Those of one position follow one another, in the order in which they are to be tried.
    """

    tokens: Tensor  # b m
    depths: Tensor  # b m, the drafted position that each is an alternative at
    valid: Tensor  # b m, those that count


@dataclass(frozen=True)
class Draft:
    """Up to `n` drafted tokens per row, and alternatives to some of them, if it is a tree.

    `probs` is q at each drafted position, after processors; None where q is one-hot, as it is when decoding is greedy.
    `steps` is how many passes of a draft it took.
    """

    tokens: Tensor  # b n
    lengths: Tensor  # b, each row's own draft length, at most n
    probs: Tensor | None  # b n v
    siblings: Siblings | None = None
    steps: int = 0

    @property
    def width(self) -> int:
        """How many tokens beside the last committed one a pass over it takes."""
        return self.nodes.shape[1]

    @property
    def nodes(self) -> Tensor:
        """All that a pass takes beside the last committed token: the drafted tokens, then their siblings, `b n+m`."""
        return self.tokens if self.siblings is None else torch.cat([self.tokens, self.siblings.tokens], dim=1)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where it lies in memory."""
        tensors = (self.tokens, self.lengths, self.probs, *(vars(self.siblings).values() if self.siblings else ()))
        return tuple(tensor.data_ptr() for tensor in tensors if tensor is not None)

    @classmethod
    def empty(cls, rows: int, device: torch.device, steps: int = 0) -> Draft:
        """Nothing drafted in any row."""
        nothing = torch.zeros(rows, dtype=torch.long, device=device)
        return cls(tokens=nothing.new_empty(rows, 0), lengths=nothing, probs=None, steps=steps)

    def padded(self, n: int) -> Draft:
        """The same draft in `n` columns; no row's own length changes."""
        missing = n - self.tokens.shape[1]
        if missing == 0:
            return self
        probs = None if self.probs is None else torch.nn.functional.pad(self.probs, (0, 0, 0, missing))
        tokens = torch.nn.functional.pad(self.tokens, (0, missing))
        return Draft(tokens, self.lengths, probs, self.siblings, self.steps)


@dataclass(frozen=True)
class Rescue:
    """Rows whose first wrong token a sibling stands in for: the sibling, and its place in the pass, from 0."""

    rescued: Tensor  # b
    tokens: Tensor  # b
    places: Tensor  # b


@dataclass(frozen=True)
class Acceptance:
    """How many drafted tokens each row accepts, a sibling included, and its recovered or bonus token."""

    accepted: Tensor  # b
    following: Tensor  # b
    rescue: Rescue | None = None

    def path(self, n: int) -> Tensor:
        """Where the accepted tokens and the last committed one before them stand in the pass, `b n+1`."""
        places = torch.arange(n + 1, device=self.accepted.device).repeat(len(self.accepted), 1)
        if self.rescue is None:
            return places
        own = torch.where(self.rescue.rescued, self.rescue.places, self.accepted)
        return places.scatter(1, self.accepted[:, None], own[:, None])


def to_probs(scores: Tensor) -> Tensor:
    """Processed logits to probabilities, float32."""
    return torch.softmax(scores.float(), dim=-1)


def sample(probs: Tensor) -> Tensor:
    """One token from each distribution `... v`, by the exponential race: needs no read of the device."""
    return _race(probs).argmax(dim=-1)


def _race(probs: Tensor) -> Tensor:
    """The larger, the sooner a token arrives. Zero probabilities stay zero, so an impossible token is never drawn."""
    return probs / torch.empty_like(probs).exponential_().clamp_min_(torch.finfo(probs.dtype).tiny)


@dataclass(frozen=True)
class Picked:
    """A chosen token, and q where it was drawn. Of trees also `k` alternatives to it, in the order in which they are
    to be tried, whether each is possible at all, and q's k + 1 largest probabilities.
    """

    token: Tensor  # b
    probs: Tensor | None  # b v
    alternatives: Tensor | None = None  # b k
    possible: Tensor | None = None  # b k
    odds: Tensor | None = None  # b k+1


def pick(scores: Tensor, *, sampling: bool) -> Picked:
    """The next token for processed logits `b v`: drawn from q, or the likeliest if greedy."""
    if not sampling:
        return Picked(scores.argmax(dim=-1), None)
    probs = to_probs(scores)
    return Picked(sample(probs), probs)


def pick_several(scores: Tensor, k: int, *, sampling: bool) -> Picked:
    """As `pick`, with `k` alternatives: the next likeliest if greedy, else drawn from q without replacement."""
    probs = to_probs(scores)
    odds, likeliest = probs.topk(k + 1, dim=-1)
    if not sampling:
        return Picked(likeliest[:, 0], None, likeliest[:, 1:], odds[:, 1:] > 0, odds)
    # The order in which an exponential race ends is that of drawing without replacement.
    drawn = _race(probs).topk(k + 1, dim=-1).indices
    possible = probs.gather(1, drawn[:, 1:]) > 0
    return Picked(drawn[:, 0], probs, drawn[:, 1:], possible, odds)


def accept(draft: Draft, scores: Tensor, *, sampling: bool) -> Acceptance:
    """Check a draft against the target's processed logits `b n+1 v`, or `b n+1+m v` of a tree, each row for itself.

    Greedy: the longest prefix that equals the target's argmax, then the target's argmax.
    Sampling: accept a token x with probability min(1, p(x) / q(x)); where the first one fails, draw from
    max(p - q, 0) normalised; when all passed, draw from p (Leviathan et al. 2023, Alg. 1, arXiv:2211.17192). Siblings
    of the one that failed are tried before that, see `_try_siblings`.
    """
    n = draft.tokens.shape[1]
    if not sampling:
        return _accept_greedily(draft, scores.argmax(dim=-1))
    p = to_probs(scores)
    if n == 0:
        return Acceptance(draft.lengths, sample(p[:, 0]))
    trunk = p[:, : n + 1]
    q = one_hot(draft.tokens, p) if draft.probs is None else draft.probs
    p_drafted, q_drafted = (probs[:, :n].gather(2, draft.tokens[..., None])[..., 0] for probs in (p, q))  # b n
    # u < p / q without dividing; u < 1, so p >= q always passes, and p = 0 never does.
    accepted = _leading(torch.rand_like(p_drafted) * q_drafted < p_drafted, draft.lengths)
    if draft.siblings is not None:
        return _try_siblings(draft, draft.siblings, p, q, accepted)
    return Acceptance(accepted, _recovered_or_bonus(trunk, q, accepted, accepted < draft.lengths))


def _accept_greedily(draft: Draft, best: Tensor) -> Acceptance:
    """As `accept`, by the target's choice behind every token of the pass, `b n+1` or `b n+1+m`."""
    n, siblings = draft.tokens.shape[1], draft.siblings
    accepted = _leading(draft.tokens == best[:, :n], draft.lengths)
    following = best.gather(1, accepted[:, None])[:, 0]
    if siblings is None:
        return Acceptance(accepted, following)
    right = siblings.valid & (siblings.depths == accepted[:, None]) & (siblings.tokens == following[:, None])  # b m
    places = n + 1 + right.long().argmax(dim=1)
    rescue = Rescue(right.any(dim=1), following, places)
    behind = torch.where(rescue.rescued, best.gather(1, places[:, None])[:, 0], following)
    return Acceptance(accepted + rescue.rescued, behind, rescue)


def _try_siblings(draft: Draft, siblings: Siblings, p: Tensor, q: Tensor, accepted: Tensor) -> Acceptance:
    """Where a drafted token failed, try its siblings in turn, then draw what is left.

    They were drawn from q without replacement. With r, what is left of p (max(p - q, 0) normalised at first), and q
    without the tokens that failed, normalised: a sibling x is accepted with probability min(1, r(x) / q(x)), else r
    becomes max(r - q, 0) normalised. Whatever comes out has the distribution p (recursive rejection sampling, Jeon et
    al. 2024, Alg. 1, arXiv:2402.14160). How many siblings a position has may depend on q and on drafted tokens, never
    on what the siblings are.
    """
    n, rows = draft.tokens.shape[1], torch.arange(len(accepted), device=accepted.device)
    at = accepted.clamp(max=n - 1)
    failed = accepted < draft.lengths
    p_next, q_next = p[rows, accepted], q[rows, at]  # b v
    left = _residual(p_next, q_next)
    going = _without(q_next, draft.tokens[rows, at])
    rescued, places = torch.zeros_like(failed), torch.zeros_like(accepted)
    for m, (token, depth, valid) in enumerate(
        zip(siblings.tokens.unbind(1), siblings.depths.unbind(1), siblings.valid.unbind(1), strict=True)
    ):
        tried = failed & ~rescued & valid & (depth == accepted)
        passed = torch.rand_like(left[:, 0]) * going[rows, token] < left[rows, token]
        places = torch.where(tried & passed, n + 1 + m, places)
        rescued = rescued | (tried & passed)
        missed = (tried & ~passed)[:, None]
        left = torch.where(missed, _residual(left, going), left)
        going = torch.where(missed, _without(going, token), going)
    drawn = torch.where(failed[:, None], left, p_next)
    drawn = torch.where(rescued[:, None], p[rows, places], drawn)
    tokens = siblings.tokens.gather(1, (places - n - 1).clamp(min=0)[:, None])[:, 0]
    return Acceptance(accepted + rescued, sample(drawn), Rescue(rescued, tokens, places))


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0) normalised, `b v`; where rounding leaves nothing, p and q were equal, and p itself is right."""
    left = (p - q).clamp_min_(0)
    total = left.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, left / total.clamp_min(torch.finfo(p.dtype).tiny), p)


def _without(q: Tensor, tokens: Tensor) -> Tensor:
    """q once these tokens (`b`) are out of it, normalised: `b v`."""
    left = q.scatter(1, tokens[:, None], 0)
    return left / left.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)


def one_hot(tokens: Tensor, p: Tensor) -> Tensor:
    """All probability on each token: `b n` to `b n v`, in p's type."""
    return p.new_zeros(*tokens.shape, p.shape[-1]).scatter_(2, tokens[..., None], 1)


def _leading(passed: Tensor, lengths: Tensor) -> Tensor:
    """How many of each row's first `lengths` tokens passed before one failed: `b n` to `b`."""
    within = torch.arange(passed.shape[1], device=passed.device) < lengths[:, None]
    return (passed & within).long().cumprod(dim=1).sum(dim=1)


def _recovered_or_bonus(p: Tensor, q: Tensor, accepted: Tensor, rejected: Tensor) -> Tensor:
    """From max(p - q, 0) in rows that rejected a token, from p in the others."""
    rows = torch.arange(p.shape[0], device=p.device)
    p_next = p[rows, accepted]  # b v
    q_next = q[rows, accepted.clamp(max=q.shape[1] - 1)] * rejected[:, None]  # b v
    residual = (p_next - q_next).clamp_min_(0)
    # Where rounding leaves no residual, p and q were equal, and p itself is right.
    return sample(torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, p_next))
