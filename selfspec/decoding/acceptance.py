"""Acceptance: a draft, which of its tokens the target accepts, and the tokens that a row then commits.

A drafted token that passes is *accepted*. The *recovered* token is the target's token where the first drafted token
fails. The *bonus* token is the extra token when all drafted tokens pass. p is the target's distribution, q the draft's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from selfspec.decoding.sampling import one_hot, sample, to_probs
from selfspec.models.unsafe_tokens import UnsafeTokens


@dataclass(frozen=True)
class Draft:
    """Up to `n` drafted tokens in each row."""

    tokens: Tensor  # b n
    lengths: Tensor  # b, each row's own draft length, at most n
    probs: Tensor | None  # b n v, q after processors; None where q is one-hot, as in greedy decoding
    steps: int = 0  # passes of the draft

    @property
    def width(self) -> int:
        """Columns of `tokens`: n."""
        return self.tokens.shape[1]

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the draft's tensors lie in memory."""
        tensors = (self.tokens, self.lengths, self.probs)
        return tuple(tensor.data_ptr() for tensor in tensors if tensor is not None)

    @classmethod
    def empty(cls, rows: int, device: torch.device, steps: int = 0) -> Draft:
        """A draft without a token in any row."""
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        return cls(lengths.new_empty(rows, 0), lengths, None, steps)

    def padded(self, n: int) -> Draft:
        """The same draft in `n` columns; no row's own length changes."""
        missing = n - self.width
        if missing == 0:
            return self
        probs = None if self.probs is None else torch.nn.functional.pad(self.probs, (0, 0, 0, missing))
        return Draft(torch.nn.functional.pad(self.tokens, (0, missing)), self.lengths, probs, self.steps)

    def safe(self, unsafe: UnsafeTokens | None) -> Draft:
        """The same draft, which ends in each row before the first unsafe token.

        q is zero on unsafe tokens unless no other token is possible, so the cut does not change the distribution.
        """
        if unsafe is None:
            return self
        kept = (~unsafe.mask[self.tokens]).long().cumprod(dim=1).sum(dim=1)  # b
        return Draft(unsafe.replaced(self.tokens), torch.minimum(self.lengths, kept), self.probs, self.steps)


@dataclass(frozen=True)
class Acceptance:
    """How many drafted tokens each row accepts, and its recovered or bonus token."""

    accepted: Tensor  # b
    following: Tensor  # b


Origin = Literal["lookup", "layers", "draft model"]
"""The drafter that drafted in a row."""


@dataclass
class Committed:
    """The tokens that one round committed in one row, `accepted` of them drafted by `origin`."""

    row: int  # index in the batch
    start: int  # where the tokens begin in the row, padding included
    tokens: list[int]  # the accepted tokens, then the recovered or bonus token
    drafted: int
    accepted: int
    origin: Origin | None = None  # None in plain decoding


def accept(draft: Draft, scores: Tensor, *, sampling: bool) -> Acceptance:
    """Check a draft against the target's processed logits `b n+1 v`, each row for itself.

    Greedy: the longest prefix that equals the target's argmax, then the target's argmax.
    Sampling: accept a token x with probability min(1, p(x) / q(x)); where the first one fails, draw from
    max(p - q, 0) normalised; when all passed, draw from p (Leviathan et al. 2023, Alg. 1, arXiv:2211.17192).
    """
    n = draft.width
    if not sampling:
        best = scores.argmax(dim=-1)  # b n+1
        accepted = _leading(draft.tokens == best[:, :n], draft.lengths)
        return Acceptance(accepted, best.gather(1, accepted[:, None])[:, 0])
    p = to_probs(scores)
    if n == 0:
        return Acceptance(draft.lengths, sample(p[:, 0]))
    q = one_hot(draft.tokens, p) if draft.probs is None else draft.probs
    p_drafted, q_drafted = (probs[:, :n].gather(2, draft.tokens[..., None])[..., 0] for probs in (p, q))  # b n
    # u < p / q without dividing; u < 1, so p >= q always passes, and p = 0 never does.
    accepted = _leading(torch.rand_like(p_drafted) * q_drafted < p_drafted, draft.lengths)
    return Acceptance(accepted, _recovered_or_bonus(p, q, accepted, accepted < draft.lengths))


def in_first(counts: Tensor, width: int) -> Tensor:
    """Whether a column is among each row's first `counts` (`b`) columns: `b width`."""
    return torch.arange(width, device=counts.device) < counts[:, None]


def _leading(passed: Tensor, lengths: Tensor) -> Tensor:
    """How many of each row's first `lengths` tokens passed before one failed: `b n` to `b`."""
    return (passed & in_first(lengths, passed.shape[1])).long().cumprod(dim=1).sum(dim=1)


def _recovered_or_bonus(p: Tensor, q: Tensor, accepted: Tensor, rejected: Tensor) -> Tensor:
    """Draw from max(p - q, 0) in rows that rejected a token, from p in the others."""
    rows = torch.arange(p.shape[0], device=p.device)
    p_next = p[rows, accepted]  # b v
    q_next = q[rows, accepted.clamp(max=q.shape[1] - 1)] * rejected[:, None]  # b v
    residual = (p_next - q_next).clamp_min_(0)
    # Where rounding leaves no residual, p and q are equal, and p itself is right.
    return sample(torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, p_next))
