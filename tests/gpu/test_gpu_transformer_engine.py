"""Chains of Transformer Engine's parts on a CUDA device: numbers of the oracle and of Megatron, runs on both backends.

Not yet run.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from model_build import EXPERTS, errors, gradient, make_config, make_layer, make_oracle, parts_of, reset_megatron
from model_oracle import CHAINS, chain_of, make_batch, oracle_step
from programs import python

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.local_backend.megatron_compat import has_transformer_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_transformer_engine(), reason="Transformer Engine is not installed"),
]
SIZES = {"hidden_size": 32, "moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 16}
DTYPES: dict[torch.dtype, float] = {torch.float32: 0.01, torch.bfloat16: 0.06}  # largest errors; fp32 means TF32


def _config(dtype: torch.dtype, **changes: Any) -> Any:
    bf16 = dtype == torch.bfloat16
    return make_config(
        **SIZES, params_dtype=dtype, bf16=bf16, moe_router_dtype="fp32", moe_grouped_gemm=True, **changes
    )


def _step(layer: TransformerLayer, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """h', the gradient of h and every parameter's gradient, by the layer's own names."""
    h_SBD, grad_SBD = (part.to(device, dtype).transpose(0, 1).contiguous() for part in make_batch(SIZES["hidden_size"]))
    h_SBD.requires_grad_()
    out_SBD = layer._forward_mlp(h_SBD)
    out_SBD.backward(grad_SBD)
    mlp = {name: p for name, p in layer.named_parameters() if name.startswith(("mlp.", "pre_mlp_layernorm."))}
    return {"h'": out_SBD.detach(), "h": h_SBD.grad, **{name: gradient(p) for name, p in mlp.items()}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_layer_follows_oracle(device: torch.device, chain: tuple[str, str, str], dtype: torch.dtype) -> None:
    """With every expert chosen for every token, since rounding may turn a close choice and then nothing is alike."""
    reset_megatron()
    config, settings = _config(dtype, moe_router_topk=EXPERTS), chain_of(chain, iterations=2)
    layer = make_layer(config, settings, use_transformer_engine=True).to(device)
    oracle = make_oracle(config, settings)
    theirs, experts = dict(oracle.named_parameters()), layer.mlp.experts
    weights = {
        f"mlp.experts.{linear}.weight{expert}": theirs[name][expert]
        for name, linear in (("w1", "linear_fc1"), ("w2", "linear_fc2"))
        for expert in range(EXPERTS)
    }
    experts.weight1 = experts.weight2 = None  # which `parts_of` reads of our own
    names = {id(parameter): name for name, parameter in parts_of(layer).items() if parameter is not None}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name in weights or id(parameter) in names:
                parameter.copy_(weights[name] if name in weights else theirs[names[id(parameter)]])
    found = {name: value.float().cpu() for name, value in _step(layer, device, dtype).items()}
    of_oracle = oracle_step(oracle, *make_batch(SIZES["hidden_size"]))
    ours = {"h'": found["h'"].transpose(0, 1), "h": found["h"].transpose(0, 1)}
    ours |= {names[id(p)]: found[name] for name, p in layer.named_parameters() if id(p) in names}
    for name, linear in (("w1", "linear_fc1"), ("w2", "linear_fc2")):
        ours[name] = torch.stack([found[f"mlp.experts.{linear}.weight{expert}"] for expert in range(EXPERTS)])
    assert max(errors(ours, of_oracle).values()) <= DTYPES[dtype]


def test_with_one_iteration_it_is_megatrons_layer(device: torch.device) -> None:
    reset_megatron()
    config = _config(torch.bfloat16)
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=EXPERTS, moe_grouped_gemm=True)
    stock = build_module(spec, config=config, layer_number=1).to(device)
    layer = make_layer(config, ChainSettings(1), use_transformer_engine=True).to(device)
    assert isinstance(layer.mlp.experts, TEGroupedMLP)
    layer.load_state_dict(stock.state_dict())
    expected = _step(stock, device, torch.bfloat16)
    reset_megatron()
    assert max(errors(_step(layer, device, torch.bfloat16), expected).values()) <= 0.01  # sums in another order


@pytest.mark.parametrize("mode", ["iteration", "layer"])
def test_recomputing(device: torch.device, mode: str) -> None:
    config = _config(torch.bfloat16, hidden_dropout=0.1)
    modes, chain = ("none", mode), ChainSettings(3)
    reset_megatron()
    layers = [make_layer(config, chain, recompute=each, use_transformer_engine=True).to(device) for each in modes]
    layers[1].load_state_dict(layers[0].state_dict())
    found = []
    for layer in layers:
        torch.manual_seed(7)
        found.append(_step(layer, device, torch.bfloat16))
    assert max(errors(found[1], found[0]).values()) <= 0.02


def _run(data: Path, output: Path, backend: str, steps: int, *settings: str) -> list[dict[str, Any]]:
    """A run of the quickstart's model in bf16; its records."""
    fixed = ["parallel.expert=1", "training.precision=bf16", "model.vocab_size=512", f"training.steps={steps}"]
    run = ("launch/pretrain_coe.py", "configs/quickstart.yaml", f"data.path={data}", f"output={output}")
    done = python(*run, *fixed, f"model.backend={backend}", *settings, seconds=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.run
def test_runs_on_both_backends_continue_each_other(device: torch.device, prepared: Path, tmp_path: Path) -> None:
    lines = _run(prepared, tmp_path / "te", "transformer_engine", 30)
    assert lines[-1]["valid_loss"] < lines[0]["valid_loss"] - 1
    still = ("optimizer.lr=1e-12", "training.evaluate_every=1")
    local = _run(prepared, tmp_path / "local", "local", 1, f"training.warm_start={tmp_path / 'te'}", *still)
    source = f"training.warm_start={tmp_path / 'local'}"
    back = _run(prepared, tmp_path / "back", "transformer_engine", 1, source, "zero.stage=3", *still)
    for found in (local, back):
        assert found[-1]["valid_loss"] == pytest.approx(lines[-1]["valid_loss"], rel=0.01)
