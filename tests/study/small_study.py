"""A small study, as the keys of its file, and the config that it is based on."""

from typing import Any

BASE = """\
output: nowhere
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 16, vocab_size: 64}
moe: {num_experts: 8, topk: 4, ffn_hidden_size: 16}
data: {path: nowhere, validation_samples: 8}
training: {steps: 100, global_batch: 4, micro_batch: 2, evaluate_every: 50, save_every: 100}
"""
STUDY: dict[str, Any] = {
    "base": "base.yaml",
    "output": "runs/small",
    "axes": {
        "design": {
            "MoE(4/8)": {"chain.iterations": 1, "moe.topk": 4},
            "CoE-2(2/8)": {"chain.iterations": 2, "moe.topk": 2},
        },
        "norm_placement": {"chain.norm_placement": ["prenorm", "iteration_norm"]},
    },
    "skip": [{"where": {"design": "MoE(4/8)", "norm_placement": "iteration_norm"}, "reason": "at C = 1 it is prenorm"}],
    "baseline": {"design": "MoE(4/8)", "norm_placement": "prenorm"},
    "seeds": [1, 2],
}
