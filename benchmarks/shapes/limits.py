"""Limits: what no runtime can beat, in closed form."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from transformers import PreTrainedModel

LONGEST_DRAFT = 12


@dataclass(frozen=True, kw_only=True)
class PassTimes:
    """Seconds of passes measured in isolation: the target over one token, the draft over one, and the target over
    gamma + 1."""

    plain: float
    draft: float
    verify: float

    @property
    def draft_cost(self) -> float:
        """In plain passes."""
        return self.draft / self.plain

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def weight_bytes(model: PreTrainedModel, rows: int) -> int:
    """Bytes of weights that a pass over one token in each of `rows` rows reads.

    All parameters but the input embedding, of which a pass looks up one row per token; where it is tied to the head it
    is read whole, once.
    """
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    looked_up = rows * embedding.shape[1] * embedding.itemsize
    read = sum(p.nbytes for p in model.parameters() if p is not embedding)
    return read + (embedding.nbytes if head is embedding else looked_up)


def kv_bytes(model: PreTrainedModel, rows: int, context: float) -> float:
    """Bytes of keys and values that a pass reads where each of `rows` rows has `context` tokens cached."""
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * size * rows * context * model.dtype.itemsize


def bandwidth_limit(model: PreTrainedModel, rows: int, context: float, bytes_per_second: float) -> float:
    """Tokens per second of plain decoding that reads its weights and its cache once a pass, and does nothing else."""
    return rows * bytes_per_second / (weight_bytes(model, rows) + kv_bytes(model, rows, context))


def expected_tokens(agreement: float, gamma: int) -> float:
    """Tokens of a round whose drafted tokens are accepted with this probability each: (1 - a^(gamma+1)) / (1 - a)."""
    return sum(agreement**i for i in range(gamma + 1))


def best_gamma(agreement: float, draft_cost: float) -> int:
    """The draft length (1 or more) that is best where a verify pass costs one plain pass."""
    return max(range(1, LONGEST_DRAFT + 1), key=lambda n: expected_tokens(agreement, n) / (n * draft_cost + 1))


def ideal_speedup(tokens_per_round: float, gamma: int, passes: PassTimes) -> float:
    """Over plain decoding, where rounds take their passes and nothing else, and plain decoding its."""
    return tokens_per_round * passes.plain / (gamma * passes.draft + passes.verify)
