"""Launches and bytes of one iteration of the paper's MoE layer on the pretended device, forward and backward.

    PYTHONPATH=tests python tests/rehearsal/launch_table.py [--operators] [--json FILE] [OVERRIDE ...]

The config is configs/paper/coe-2_4-64.yaml with overrides such as `training.micro_batch=1`. A layer runs once to warm
up, and then twice, without gradients from before. `launches` says what is counted. Products in bf16 are zeros of the
right shape, since a CPU takes minutes for them, and what is counted depends on routes and shapes alone.
"""

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from launches import Launches, Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from coe_megatron.text import aligned

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "paper" / "coe-2_4-64.yaml"
# Megatron's own functions that CUDA gets compiled. They run eagerly here, and count as one launch each.
AS_ONE = [
    f"megatron.core.fusions.fused_bias_swiglu.{name}"
    for name in ("swiglu", "swiglu_back", "weighted_swiglu", "weighted_swiglu_back")
]
DIRECTIONS = ("forward", "backward")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--operators", action="store_true", help="also the work of each operator")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--products", action="store_true", help="compute the products")
    parser.add_argument("--mistake", action="store_true", help="each iteration copies its input once more")
    options = parser.parse_args()
    if "pretended" not in sys.modules:
        from rehearse import rehearse

        status, out = rehearse(__file__, *sys.argv[1:], seconds=3600)
        print(out, end="")
        return status
    with contextlib.nullcontext() if options.products else _WithoutProducts():
        found = measure(options.overrides, options.mistake)
    print(table(found))
    if options.operators:
        print(operators(found))
    if options.json:
        options.json.write_text(json.dumps(found))
    return 0


class _WithoutProducts(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name not in ("aten::mm", "aten::_grouped_mm") or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs or {})
        shapes = tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="meta"), (args, kwargs or {}))
        return torch.zeros_like(func(*shapes[0], **shapes[1]), device=args[0].device)


def measure(overrides: list[str], mistake: bool = False) -> dict[str, dict[str, Any]]:
    """By layer: `iterations`, and for `forward` and `backward` the work of each operator in both measured passes."""
    from layers import make_mistake
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from model_build import make_coe, make_stock

    from coe_megatron.config.load import load
    from coe_megatron.local_backend import megatron_compat, without_cuda
    from coe_megatron.model.build import transformer_config

    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)  # a line for each expert
    megatron_compat.install()
    without_cuda.install()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    if mistake:
        make_mistake("a copy in the layer")
    run = load(CONFIG, overrides)
    config = transformer_config(run)
    fused = replace(config, bias_activation_fusion=True)
    layers: dict[str, tuple[int, Callable]] = {
        "chain, C = 2": (2, lambda: make_coe(config, iterations=2)),
        "chain, C = 1": (1, lambda: make_coe(config)),
        "MoELayer": (1, lambda: make_stock(config)),
        "MoELayer, SwiGLU fused": (1, lambda: make_stock(fused)),
    }
    tokens = run.model.seq_length, run.training.micro_batch
    return {name: {"iterations": c, **passes(make(), tokens)} for name, (c, make) in layers.items()}


def passes(layer: torch.nn.Module, tokens: tuple[int, int]) -> dict[str, list[dict[str, Work]]]:
    """The work of each operator in two forward and two backward passes of [S, B] tokens."""
    found: dict[str, list[dict[str, Work]]] = {direction: [] for direction in DIRECTIONS}
    layer.to(torch.cuda.current_device())
    h_SBD = torch.randn(*tokens, layer.config.hidden_size, device="cpu").to("cuda", layer.config.params_dtype)
    gradient_SBD = torch.randn_like(h_SBD)
    h_SBD.requires_grad_()
    for _ in range(3):
        layer.zero_grad()
        h_SBD.grad = None
        with Launches(AS_ONE) as forward:
            out, _ = layer(h_SBD)
        with Launches(AS_ONE) as backward:
            out.backward(gradient_SBD)
        found["forward"].append(forward.of)
        found["backward"].append(backward.of)
    return {direction: counted[1:] for direction, counted in found.items()}


def per_iteration(layer: dict[str, Any], direction: str) -> tuple[float, float]:
    """Launches and bytes of a layer's first measured pass, divided by its iterations."""
    launches, size = (sum(work[i] for work in layer[direction][0].values()) for i in (0, 1))
    return launches / layer["iterations"], size / layer["iterations"]


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = [["per iteration", "launches forward", "backward", "GB forward", "backward"]]
    for name, layer in found.items():
        launches, size = zip(*(per_iteration(layer, direction) for direction in DIRECTIONS), strict=True)
        rows.append([name, *(f"{n:,g}" for n in launches), *(f"{n / 1e9:.2f}" for n in size)])
    return "\n".join(aligned(rows))


def operators(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, layer in found.items():
        for direction in DIRECTIONS:
            rows += [[f"{name}, {direction}, {layer['iterations']} iteration(s)", "launches", "GB"]]
            rows += [[of, f"{n:,}", f"{size / 1e9:.3f}"] for of, (n, size) in layer[direction][0].items()]
    return "\n".join(aligned(rows))


if __name__ == "__main__":
    sys.exit(main())
