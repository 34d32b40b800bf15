"""Forward and backward passes of layers of all kinds, on CPU or on the pretended device; run by test_rehearsal_layers.

python tests/rehearsal/layers.py OUTPUT [MISTAKE]
"""

import sys
from collections import Counter
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from model_build import copy_from_oracle, gradient, make_config, make_layer, make_oracle, make_stock
from saved_bytes import without_padding

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.local_backend import megatron_compat, without_cuda
from coe_megatron.local_backend.attention import SDPACoreAttention
from coe_megatron.local_backend.experts import GroupedExperts
from coe_megatron.model.layer import CoELayer
from coe_megatron.model.router_state import update_router_state
from coe_megatron.model.routing_stats import report_routing, reset_routing

SHARED = {"moe_shared_expert_intermediate_size": 16}
BF16 = {"params_dtype": torch.bfloat16, "bf16": True}
LOSSES = {"moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.1}
BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # changes of the config, chain, recompute
    "fp32": ({}, {}, "none"),
    "bf16": (BF16, {}, "none"),
    "bf16, three iterations": (BF16, {"iterations": 3}, "none"),
    "bf16, one iteration": (BF16, {"iterations": 1}, "none"),
    "shared experts": ({**BF16, **SHARED}, {}, "none"),
    "recompute experts": (BF16, {}, "experts"),
    "recompute iteration": ({**BF16, **LOSSES}, {}, "iteration"),
    "recompute layer": ({**BF16, **LOSSES}, {}, "layer"),
    "shared router": (BF16, {"gating": "shared_router"}, "none"),
    "fixed": (BF16, {"gating": "fixed"}, "none"),
    "outer": (BF16, {"residual": "outer"}, "none"),
    "init, reference": (BF16, {"residual": "init", "norm_placement": "reference"}, "none"),
    "iteration norm": (BF16, {"norm_placement": "iteration_norm"}, "none"),
    "variants": (BF16, {"learned_scale": 0.5, "conditioned": True}, "none"),
    "no return": (BF16, {"no_return": True}, "none"),
    "aux_loss": ({**BF16, **LOSSES, "moe_router_load_balancing_type": "aux_loss"}, {}, "none"),
    "global_aux_loss": ({**BF16, **LOSSES, "moe_router_load_balancing_type": "global_aux_loss"}, {}, "none"),
    "expert bias": ({**BF16, **BIAS}, {}, "none"),
    "capacity": ({**BF16, "moe_expert_capacity_factor": 1.0, "moe_token_drop_policy": "probs"}, {}, "none"),
    "experts without rows": ({**BF16, "num_moe_experts": 64}, {}, "none"),
    "recompute experts without rows": ({**BF16, "num_moe_experts": 64}, {}, "experts"),
    "allgather": ({**BF16, "moe_token_dispatcher_type": "allgather"}, {}, "none"),
}
EXPERTS: dict[str, dict[str, Any]] = {
    "no rows": {"rows": 0},
    "no rows, recompute": {"rows": 0, "recompute": True},
    "an odd address": {"rows": 5, "offset": 3},
}
MISTAKES = ("a read in the layer", "a tensor on another device", "an early read")


def waits() -> int:
    pretended = sys.modules.get("pretended")
    return sum(pretended._log["syncs"].values()) if pretended else 0


def run(name: str) -> dict[str, Any]:
    changes, chain, recompute = CASES[name]
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = make_config(hidden_size=32, moe_ffn_hidden_size=16, **changes)
    settings = ChainSettings(**{"iterations": 2, **chain})
    oracle, layer = make_oracle(config, settings), make_layer(config, settings, recompute=recompute)
    copy_from_oracle(layer, oracle)
    found: dict[str, Any] = {}
    for micro_batch in range(2):
        h_SBD = torch.randn(6, 3, 32).to(config.params_dtype).to(torch.cuda.current_device()).requires_grad_()
        mask_BS = torch.zeros(3, 6, dtype=torch.bool, device=h_SBD.device)
        mask_BS[1, 4:] = True
        reset_routing(layer, detailed=micro_batch == 1)
        before = waits()
        out = layer._forward_mlp(h_SBD, padding_mask=mask_BS if name == "aux_loss" else None)
        forward = waits()
        out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype))
        found |= {"forward waits": forward - before, "backward waits": waits() - forward}
        found |= {f"out {micro_batch}": out.detach().cpu(), f"input {micro_batch}": h_SBD.grad.cpu()}
    found["report"] = [report.as_dict() for report in report_routing(layer)]
    update_router_state(layer)
    found |= {f"gradient of {key}": gradient(value).cpu() for key, value in layer.named_parameters()}
    found |= {f"buffer {key}": value.cpu() for key, value in layer.named_buffers()}
    layer.eval()
    with torch.no_grad():
        found["evaluation"] = layer._forward_mlp(h_SBD).cpu()
    return found


def run_stock(**changes: Any) -> dict[str, int]:
    """Waits of Megatron's own MoE layer, with its sequential experts."""
    layer = make_stock(make_config(hidden_size=32, moe_ffn_hidden_size=16, **changes)).to(torch.cuda.current_device())
    h_SBD = torch.randn(6, 3, 32, device="cpu").to(layer.config.params_dtype).to(torch.cuda.current_device())
    before = waits()
    out, _ = layer(h_SBD.requires_grad_())
    forward = waits()
    out.float().square().sum().backward()
    return {"forward waits": forward - before, "backward waits": waits() - forward}


def run_experts(rows: int, offset: int = 0, recompute: bool = False) -> dict[str, Any]:
    """Experts alone, with that many rows for the second of four and weights that far from an aligned address."""
    torch.manual_seed(2)
    config = make_config(hidden_size=32, num_moe_experts=4, moe_ffn_hidden_size=16, **BF16)
    experts = GroupedExperts(4, config, pg_collection=get_default_pg_collection(), recompute=recompute)
    for weight in experts.parameters():
        flat = torch.randn(weight.numel() + offset, device="cpu").bfloat16().to(weight.device)
        weight.data = flat[offset:].view_as(weight)
    h_TD = torch.randn(rows, 32, device="cpu").bfloat16().to(weight.device).requires_grad_()
    gates_T = torch.ones(rows, device=h_TD.device, requires_grad=True)
    out, _ = experts(h_TD, torch.tensor([0, rows, 0, 0]), gates_T)
    out.float().square().sum().backward()
    leaves = {"rows": h_TD, "gates": gates_T, **dict(experts.named_parameters())}
    return {"out": out.detach().cpu()} | {f"gradient of {name}": leaf.grad.cpu() for name, leaf in leaves.items()}


def attend(pads_values: bool) -> tuple[torch.Tensor, list[str]]:
    """Attention with values that are shorter than keys, and the kernel that CUDA would take for it."""
    torch.manual_seed(3)
    config = make_config(**BF16)
    core = SDPACoreAttention(config, 1, AttnMaskType.causal, "self", k_channels=12, v_channels=8)
    core.pads_values = pads_values
    device = torch.cuda.current_device()
    q, k, v = (torch.randn(6, 2, 2, size, device="cpu").bfloat16().to(device) for size in (12, 12, 8))
    before = kernels()
    return core(q, k, v, None).cpu(), list(kernels() - before)


def kernels() -> Counter[str]:
    pretended = sys.modules.get("pretended")
    notes = pretended._log["notes"] if pretended else {}
    return Counter({line.split(" ")[1]: count for line, count in notes.items() if line.startswith("attention: ")})


def make_mistake(mistake: str) -> None:
    """Plant what the rehearsal has to notice."""
    iterate = CoELayer._iterate

    def wrong(self: CoELayer, t: int, given: Any, *more: Any) -> Any:
        state = given.state
        if mistake == "a read in the layer":
            state.sum().item()
        elif mistake == "a copy in the layer":
            state = state.clone()
        elif mistake == "a tensor on another device":
            state = state + torch.zeros(state.shape[-1], dtype=state.dtype, device="cpu")
        elif mistake == "an early read":
            first = state.detach().float()[0, 0].to("cpu", non_blocking=True)
            state = state + first.sum().item() * 0.0
        return iterate(self, t, given._replace(state=state), *more)

    CoELayer._iterate = wrong  # type: ignore[method-assign]


if __name__ == "__main__":
    megatron_compat.install()
    without_cuda.install()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    with without_padding():  # which changes the order of sums on a CPU with AMX, and is not done on CUDA
        if sys.argv[2:]:
            make_mistake(sys.argv[2])
            torch.save(run("bf16"), sys.argv[1])
        else:
            found = {name: run(name) for name in CASES}
            for name, options in EXPERTS.items():
                found[name] = run_experts(**options)
            found |= {"stock, bf16": run_stock(**BF16), "stock, fp32": run_stock()}
            found["attention"] = {pads: attend(pads) for pads in (False, True)}
            torch.save(found, sys.argv[1])
