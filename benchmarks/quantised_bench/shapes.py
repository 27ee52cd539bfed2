"""Shapes: a size for a CPU beside those of `gpu_bench`, and toys whose layers have sizes that the kernels take."""

from __future__ import annotations

from typing import Any

import torch
from gpu_bench.shapes import Shape
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

_PLAIN: dict[str, Any] = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
"""No token ends a text. The head is not tied to the embedding, so that it can be drawn by itself: what a pass reads
stays the same."""


def _llama_1b() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        **_PLAIN,
    )


def _toy_llama() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=528,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1021,
        **_PLAIN,
    )


def _toy_qwen3() -> PretrainedConfig:
    return Qwen3Config(
        vocab_size=528,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=1021,
        **_PLAIN,
    )


LLAMA_1B = Shape(name="Llama-3.2-1B", config=_llama_1b, dtype=torch.bfloat16)
TOY_LLAMA = Shape(name="toy Llama", config=_toy_llama, dtype=torch.bfloat16)
TOY_QWEN3 = Shape(name="toy Qwen3", config=_toy_qwen3, dtype=torch.bfloat16)
