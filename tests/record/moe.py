"""Small mixtures of experts as transformers has them, unmodified, and their training."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

import monitor

CLIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("Olmoe", {"num_experts": 8, "output_router_logits": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "output_router_logits": True}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 16, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "first_k_dense_replace": 0,
        },
    ),
}  # fmt: skip


def client(name: str) -> nn.Module:
    """Two layers of eight experts, two of them for each token."""
    kind, more = CLIENTS[name]
    module = importlib.import_module(f"transformers.models.{name}")
    torch.manual_seed(0)
    config = getattr(module, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **more,
    )  # fmt: skip
    model = getattr(module, f"{kind}ForCausalLM")(config).train()
    for path, m in model.named_modules():
        if path.endswith(".gate"):
            nn.init.normal_(m.weight, std=0.3)
    return model


def train(model: nn.Module, folder: Path, steps: int = 2, **attach: Any) -> monitor.Run:
    """Some steps on random tokens, recorded."""
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with monitor.attach(model, folder, **attach):
        for _ in range(steps):
            tokens = torch.randint(0, 64, (2, 16))
            model(tokens, labels=tokens).loss.backward()
            opt.step()
            opt.zero_grad()
    found = monitor.open(folder)
    assert not found.warnings
    return found
