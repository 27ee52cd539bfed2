"""Which drafted tokens the target accepts, and the token that follows them.

*Accepted* are drafted tokens that passed; the *recovered* token is the target's where the first one failed; the *bonus*
token is the extra one when all passed. p is the target's distribution, q the draft's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selfspec.decoding.sampling import one_hot, sample, to_probs


@dataclass(frozen=True)
class Draft:
    """Up to `n` drafted tokens per row.

    `probs` is q at each drafted position, after processors; None where q is one-hot, as it is when decoding is greedy.
    `steps` is how many passes of a draft it took.
    """

    tokens: Tensor  # b n
    lengths: Tensor  # b, each row's own draft length, at most n
    probs: Tensor | None  # b n v
    steps: int = 0

    @property
    def width(self) -> int:
        """How many tokens beside the last committed one a pass over it takes."""
        return self.tokens.shape[1]

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where it lies in memory."""
        tensors = (self.tokens, self.lengths, self.probs)
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
        return Draft(tokens, self.lengths, probs, self.steps)


@dataclass(frozen=True)
class Acceptance:
    """How many drafted tokens each row accepts, and its recovered or bonus token."""

    accepted: Tensor  # b
    following: Tensor  # b


def accept(draft: Draft, scores: Tensor, *, sampling: bool) -> Acceptance:
    """Check a draft against the target's processed logits `b n+1 v`, each row for itself.

    Greedy: the longest prefix that equals the target's argmax, then the target's argmax.
    Sampling: accept a token x with probability min(1, p(x) / q(x)); where the first one fails, draw from
    max(p - q, 0) normalised; when all passed, draw from p (Leviathan et al. 2023, Alg. 1, arXiv:2211.17192).
    """
    n = draft.tokens.shape[1]
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
