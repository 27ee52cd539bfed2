"""Limits: the bandwidth limit of plain decoding, and the ideal speedup of a draft, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

LONGEST_DRAFT = 12


@dataclass(frozen=True, kw_only=True)
class PassTimes:
    """Seconds of passes measured in isolation."""

    plain: float  # target, one token
    draft: float  # draft, one token
    verify: float  # target, gamma + 1 tokens

    @property
    def draft_cost(self) -> float:
        """Plain passes that a draft pass costs."""
        return self.draft / self.plain


def weight_bytes(model: PreTrainedModel, rows: int) -> int:
    """Bytes of weights that a pass over one token in each of `rows` rows reads.

    A pass reads one row of the input embedding per token, and all other parameters once. An embedding that is tied to
    the head is read whole, once.
    """
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    looked_up = rows * embedding.shape[1] * embedding.itemsize
    read = sum(p.nbytes for p in model.parameters() if p is not embedding)
    return read + (embedding.nbytes if head is embedding else looked_up)


def kv_bytes(model: PreTrainedModel, rows: int, context: float) -> float:
    """Bytes of keys and values that a pass reads with `context` cached tokens in each of `rows` rows."""
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * size * rows * context * model.dtype.itemsize


def bandwidth_limit(model: PreTrainedModel, rows: int, context: float, bytes_per_second: float) -> float:
    """Tokens per second of plain decoding if a pass only read weights and cache, each once."""
    return rows * bytes_per_second / (weight_bytes(model, rows) + kv_bytes(model, rows, context))


def expected_tokens(agreement: float, gamma: int) -> float:
    """Tokens per round at agreement a: (1 - a^(gamma+1)) / (1 - a) (Leviathan et al. 2023, eq. 1)."""
    return sum(agreement**i for i in range(gamma + 1))


def best_gamma(agreement: float, draft_cost: float) -> int:
    """The best draft length (1 or more) if a verify pass costs one plain pass."""
    return max(range(1, LONGEST_DRAFT + 1), key=lambda n: expected_tokens(agreement, n) / (n * draft_cost + 1))


def ideal_speedup(tokens_per_round: float, gamma: int, passes: PassTimes) -> float:
    """The speedup over plain decoding if only passes took time."""
    return tokens_per_round * passes.plain / (gamma * passes.draft + passes.verify)
