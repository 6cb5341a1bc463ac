"""Tiny language models with experts, of the families that people train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.auto import AutoModelForCausalLM

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHARED: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": tiny.POSITIONS,
    "pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS,
    "num_experts_per_tok": 2,
}  # fmt: skip
FEW: dict[str, Any] = {"moe_intermediate_size": 24, "intermediate_size": 40}
ROUTED: dict[str, Any] = {
    **FEW, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "mixtral": lambda more: MixtralConfig(intermediate_size=24, num_local_experts=4, **more),
    "qwen2_moe": lambda more: Qwen2MoeConfig(
        num_experts=4, shared_expert_intermediate_size=24, **FEW, **more
    ),
    "qwen3_moe": lambda more: Qwen3MoeConfig(num_experts=4, head_dim=8, **FEW, **more),
    "gpt_oss": lambda more: GptOssConfig(
        intermediate_size=24, num_local_experts=4, head_dim=8, sliding_window=16, **more
    ),
    "glm4_moe": lambda more: Glm4MoeConfig(head_dim=8, **ROUTED, **more),
    "deepseek_v3": lambda more: DeepseekV3Config(
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
        **ROUTED, **{**more, "num_key_value_heads": 4},
    ),
}  # fmt: skip


def model(kind: str, seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """Return a small language model of a family, with four experts of which two answer."""
    shared = {**SHARED, "num_hidden_layers": layers}
    config = CONFIGS[kind]({"vocab_size": tiny.vocabulary("llama"), **shared})
    return tiny.enliven(AutoModelForCausalLM.from_config(config), seed)


def save(folder: Path | str, kind: str, seed: int = 0) -> Path:
    """Save such a model with its tokenizer, and return its folder."""
    return tiny._save(folder, ("experts", kind, seed), lambda: model(kind, seed), "llama")


def ids(rows: int = 3) -> Tensor:
    """Return tokens, the same every time."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(4, 200, (rows, 7), generator=generator)


@torch.no_grad()
def outputs(base: nn.Module) -> Tensor:
    """Return what a model makes of the tokens."""
    return base(input_ids=ids()).logits
