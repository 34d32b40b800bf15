"""Models that transformers makes become checkpoints of ours, with the same logits; what ours cannot be is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_build import ModelWeights, distance, make_model, make_run, our_logits, random_tokens, write
from safetensors.torch import save_file
from test_convert_export import NATIVE, OTHERS, logits_of
from transformers import AutoConfig, AutoModelForCausalLM

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.checkpoint import listing, sharding
from coe_megatron.checkpoint.storage import MASTER, Reader
from coe_megatron.config import RunConfig, load
from coe_megatron.convert import native_architectures
from coe_megatron.convert.architecture import config_values
from coe_megatron.convert.coe_architecture import COE
from coe_megatron.convert.hf_import import import_model
from coe_megatron.errors import ConfigError
from coe_megatron.model.build import build_model

pytestmark = pytest.mark.usefixtures("single_rank")
CASES = [(name, config) for name, configs in NATIVE.items() for config in configs]
CASES = [(name, config) for name, config in CASES if name != "qwen2_moe" or config.moe.shared_expert_gate]


def made_by_transformers(config: RunConfig, folder: Path) -> Any:
    """A random model of the architecture that ours has, saved by transformers."""
    architecture, _ = native_architectures.of_model(config)
    values = config_values(config, architecture, 48, {})
    kind = values.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.endswith("inv_freq"):
            torch.nn.init.normal_(tensor.data, mean=float("norm" in name), std=0.2)
    model.save_pretrained(folder)
    return model


def imported(out: Path) -> torch.nn.Module:
    """Our model with the weights of an imported checkpoint."""
    config = load(out / "config.yaml")
    model = build_model(config, int(config.model.vocab_size or 0)).eval()
    reader = Reader(listing.find(out) / "tensors")
    missing = model.load_state_dict(sharding._load(sharding._weights(model), reader), strict=False)
    assert not missing.unexpected_keys and all("_extra_state" in key for key in missing.missing_keys), missing
    assert all(
        MASTER + key in reader.entries
        for key in reader.entries
        if not key.startswith("optimizer.") and "bias" not in key
    )
    return model


@pytest.mark.parametrize("number", range(len(CASES)), ids=[name for name, _ in CASES])
def test_a_model_of_transformers_has_the_same_logits(number: int, tmp_path: Path) -> None:
    _, config = CASES[number]
    theirs = made_by_transformers(config, tmp_path / "theirs")
    ours = imported(import_model(tmp_path / "theirs", tmp_path / "ours"))
    tokens = random_tokens()
    assert distance(our_logits(ours, tokens), logits_of(theirs, tokens)) < 1e-5


ROUND: dict[str, RunConfig] = OTHERS | {
    "reference": make_run("GQA", ChainSettings(2, norm_placement="reference", gating="fixed", residual="init")),
    "iteration_norm": make_run("MLA", ChainSettings(3, norm_placement="iteration_norm", gating="shared_router")),
}


@pytest.mark.parametrize("name", ROUND)
def test_an_export_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    config = ROUND[name]
    model = make_model(config)
    weights = ModelWeights(model)
    folder = write(config, COE, weights, tmp_path / "exported")
    back = ModelWeights(imported(import_model(folder, tmp_path / "ours")))
    assert back.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in weights.tensors.items())
    saved = load(tmp_path / "ours" / "config.yaml")
    kept = ("model", "moe", "chain")
    loose = {"load_balancing", "aux_loss_coeff", "vocab_size", "learned_scale"}
    for part in kept:
        before, after = vars(getattr(config, part)), vars(getattr(saved, part))
        assert {k: v for k, v in after.items() if k not in loose} == {k: v for k, v in before.items() if k not in loose}


def test_bf16_weights_stay_bf16_with_fp32_masters(tmp_path: Path) -> None:
    config = make_run(moe={"ffn_hidden_size": 16})
    folder = write(config, COE, ModelWeights(make_model(config)), tmp_path / "exported")
    values = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(values))
    out = import_model(folder, tmp_path / "ours")
    assert load(out / "config.yaml").training.precision == "bf16"
    entries = Reader(listing.find(out) / "tensors").entries
    kinds = {key.startswith("optimizer."): entry.properties.dtype for key, entry in entries.items()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type is 'llama': it must be one of"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"use_sliding_window": True, "sliding_window": 4}, "sliding_window is 4"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is 'linear'"),
    ({"mlp_only_layers": [0, 1]}, "no layer has experts"),
    ({"num_hidden_layers": 1}, "left out"),
]


@pytest.mark.parametrize(("changes", "line"), CHANGES, ids=[line for _, line in CHANGES])
def test_what_ours_cannot_be_is_refused_by_name(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    config = NATIVE["qwen3_moe"][0]
    made_by_transformers(config, tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    said: list[str] = []
    if line == "left out":
        import_model(tmp_path / "theirs", tmp_path / "ours", say=said.append)
        assert any(each.startswith("left out: the layers") for each in said)
        return
    with pytest.raises(ConfigError, match=line):
        import_model(tmp_path / "theirs", tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_a_tensor_too_many_or_too_few_is_refused(tmp_path: Path) -> None:
    made_by_transformers(NATIVE["mixtral"][0], tmp_path / "theirs")
    save_file({"model.layers.0.extra": torch.ones(2)}, tmp_path / "theirs" / "more.safetensors")
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.extra \(1 such tensors\)"):
        import_model(tmp_path / "theirs", tmp_path / "ours")
    (tmp_path / "theirs" / "more.safetensors").unlink()
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"has no tensor model\.layers\.2\."):
        import_model(tmp_path / "theirs", tmp_path / "ours")
    for name, content in (("model.safetensors", "x"), ("config.json", "{")):
        (tmp_path / "theirs" / name).write_text(content)
        with pytest.raises(ConfigError, match=name):
            import_model(tmp_path / "theirs", tmp_path / "ours")
