"""The layer and the program on a CUDA device: the same numbers as the oracle, and a run from start to end."""

import json
from pathlib import Path

import pytest
import torch
from model_build import EXPERTS, copy_from_oracle, errors, make_config, make_layer, make_oracle, reset_megatron
from model_oracle import CHAINS, chain_of, layer_step, make_batch, oracle_step
from programs import python

from coe_megatron.chain.settings import ChainSettings

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 32, "moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 16}


def _compare(device: torch.device, chain: tuple[str, str, str], dtype: torch.dtype, **changes) -> dict[str, float]:
    """Largest errors of outputs and gradients against the oracle in fp32 on the CPU, by name."""
    reset_megatron()
    config = make_config(**SIZES, params_dtype=dtype, bf16=dtype == torch.bfloat16, moe_router_dtype="fp32", **changes)
    settings = chain_of(chain, iterations=2)
    oracle, layer = make_oracle(config, settings), make_layer(config, settings)
    copy_from_oracle(layer, oracle)
    layer.to(device)
    batch = make_batch(SIZES["hidden_size"])
    found = layer_step(layer, *(part.to(device, dtype) for part in batch))
    return errors({name: value.float().cpu() for name, value in found.items()}, oracle_step(oracle, *batch))


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_layer_equals_oracle_in_fp32(device: torch.device, chain: tuple[str, str, str]) -> None:
    found = _compare(device, chain, torch.float32)
    assert max(found.values()) <= 1e-4, found  # matrix products of the GPU in full fp32


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_layer_follows_oracle_in_bf16(device: torch.device, chain: tuple[str, str, str]) -> None:
    """With every expert chosen for every token, since bf16 may turn a close choice and then nothing is alike."""
    found = _compare(device, chain, torch.bfloat16, moe_router_topk=EXPERTS)
    assert found["h'"] <= 0.02 and max(found.values()) <= 0.06, found


@pytest.mark.parametrize("mode", ["experts", "iteration", "layer"])
def test_recomputing_in_bf16(device: torch.device, mode: str) -> None:
    """With few choices: had a close one turned in the second pass, tensors would have other shapes and torch refuse."""
    config = make_config(**SIZES, params_dtype=torch.bfloat16, bf16=True, moe_router_dtype="fp32", hidden_dropout=0.1)
    reset_megatron()
    layers = [make_layer(config, ChainSettings(3), recompute=each).to(device) for each in ("none", mode)]
    layers[1].load_state_dict(layers[0].state_dict())
    found = []
    for layer in layers:
        torch.manual_seed(7)
        batch = (part.to(device, torch.bfloat16) for part in make_batch(SIZES["hidden_size"], batch=64))
        found.append({name: value.float() for name, value in layer_step(layer, *batch).items()})
    assert max(errors(found[1], found[0]).values()) <= 0.02


@pytest.mark.run
def test_a_run_in_bf16(device: torch.device, prepared: Path, tmp_path: Path) -> None:
    settings = ("parallel.expert=1", "training.steps=30", "training.precision=bf16", "model.vocab_size=512")
    run = ("launch/pretrain_coe.py", "configs/quickstart.yaml", f"data.path={prepared}", f"output={tmp_path / 'run'}")
    done = python(*run, *settings, seconds=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["valid_loss"] < lines[0]["valid_loss"] - 1
    assert lines[-1]["memory"]["peak"] > 0
