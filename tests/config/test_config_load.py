"""Configs: what is accepted survives a round trip, what is not gets one line that names the field."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.config import RunConfig, dump, load, parse
from coe_megatron.config.layout import moe_pattern
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.run_shape import padded_vocabulary

CONFIGS = sorted(
    path for path in (Path(__file__).parents[2] / "configs").rglob("*.yaml") if "studies" not in path.parts
)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("model: {hidden_size: 64}\noptimizer: {lr: 1e-3}\n")
    return path


def test_file_overrides_and_defaults_come_together(small: Path) -> None:
    config = load(small, ["chain.iterations=3", "moe.layer_freq=[0,1,1,1]"])
    assert (config.model.hidden_size, config.optimizer.lr) == (64, 1e-3)
    assert config.chain == ChainSettings(iterations=3)
    assert moe_pattern(config) == (0, 1, 1, 1)
    assert config.moe.num_experts == RunConfig().moe.num_experts


def test_bases_hold_where_the_file_says_nothing(small: Path) -> None:
    (small.parent / "sub").mkdir()
    (small.parent / "wide.yaml").write_text("model: {hidden_size: 256}\nchain: {iterations: 4}\n")
    top = small.parent / "sub" / "top.yaml"
    top.write_text("base: [../small.yaml, ../wide.yaml]\nchain: {iterations: 3}\n")
    config = load(top)
    assert (config.model.hidden_size, config.optimizer.lr, config.chain.iterations) == (256, 1e-3, 3)


@pytest.mark.parametrize(
    ("base", "said"),
    [("a.yaml", "base leads back to this file"), ("none.yaml", "there is no such file"), ("7", "base is 7")],
)
def test_a_base_that_cannot_be_one(tmp_path: Path, base: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ConfigError, match=said):
        load(tmp_path / "a.yaml")


def test_later_override_wins(small: Path) -> None:
    assert load(small, ["moe.topk=2", "moe.topk=3"]).moe.topk == 3


def test_dump_is_read_back_to_an_equal_config(small: Path) -> None:
    blend = "data.blend=[{path: a, weight: 1}, {path: b, weight: 3}]"
    config = load(small, ["model.mla={}", "training.precision=bf16", blend, "data.validation={far: c}"])
    assert config.model.mla is not None
    assert parse(OmegaConf.to_container(OmegaConf.create(dump(config)))) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_project_is_valid(path: Path) -> None:
    assert load(path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.hiden_size=3", "model.hiden_size is not a setting; did you mean model.hidden_size?"),
        ("chain.iteration=2", "did you mean chain.iterations?"),
        ("foo=1", "foo is not a setting; valid keys: output, model, moe"),
        ("moe.topk=many", "moe.topk is 'many': it should be an integer ≥ 1"),
        ("moe.topk=2.5", "moe.topk is 2.5: it should be an integer ≥ 1"),
        ("moe.topk=0", "moe.topk is 0: it should be greater than or equal to 1"),
        ("moe.topk=200", "moe.topk is 200: it must be at most moe.num_experts (64)"),
        ("moe.layer_freq=[1]", "moe.layer_freq has 1 entries: it must have one per layer (4)"),
        ("moe.layer_freq=[0,0,0,0]", "at least one layer must have experts"),
        ("moe.num_groups=8", "moe.num_groups and moe.group_topk must be given together"),
        ("moe.expert_bias=true", "it needs moe.score_function sigmoid, not softmax"),
        ("moe.pad_to_capacity=true", "it needs a moe.capacity_factor"),
        ("chain.gating=other", "chain.gating is 'other': it should be 'independent', 'shared_router' or 'fixed'"),
        ("chain.iterations=0", "chain.iterations is 0: it must be an integer of at least 1"),
        ("model=3", "model is 3: it must be a section with the keys num_layers"),
        ("model.num_attention_heads=7", "model.num_attention_heads is 7: it must divide model.hidden_size (64)"),
        ("model.num_query_groups=3", "it must divide model.num_attention_heads (4)"),
        ("optimizer.lr=-1", "optimizer.lr is -1: it should be greater than 0"),
        ("optimizer.betas=[0.9,1.5]", "optimizer.betas.1 is 1.5: it should be less than 1"),
        ("optimizer.min_lr=1", "it must be at most optimizer.lr (0.001)"),
        ("parallel.expert=3", "parallel.expert is 3: it must divide moe.num_experts (64)"),
        (
            "parallel.expert=4",
            "parallel.expert is 4: the number of ranks (2) must be a multiple of 4; start 4 (torchrun",
        ),
        ("training.micro_batch=5", "training.micro_batch is 5: it must divide training.global_batch (32)"),
        ("training.micro_batch=32", "training.micro_batch x data-parallel ranks (32 x 2 = 64)"),
        ("training.precision=fp16", "training.precision is 'fp16': it should be 'fp32' or 'bf16'"),
        ("zero.stage=7", "zero.stage is 7"),
        ("data.reset_at_documents=true", "data.reset_at_documents is true: it requires data.samples packed"),
        ("data.blend=[]", "data.blend is []: it must name at least one folder"),
        ("data.blend=[{path: a}]", "data.blend.0.weight is missing"),
        ("data.blend=[{path: a, wight: 1}]", "data.blend.0.wight is not a setting; did you mean data.blend.0.weight?"),
        ("data.blend=[{path: a, weight: 0}]", "data.blend.0.weight is 0: it should be greater than 0"),
        ("data.blend=[{path: x/a, weight: 1}, {path: y/a, weight: 1}]", "data.blend has two folders named 'a'"),
        ("data.validation={}", "data.validation is {}: it must name at least one folder"),
        ("data.validation={'': a}", "data.validation has the name ''"),
        ("data.validation={a: 3}", "data.validation.a is 3: it should be a path"),
        ("topk", "override 'topk': write it as key.sub=value"),
        ("moe=[1", "override 'moe=[1'"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(small: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(small, [override], world_size=2)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "a: 1\na: 2\n"])
def test_a_file_that_is_no_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml: "):
        load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load(tmp_path / "none.yaml")


def test_vocabulary_is_rounded_up_or_as_asked() -> None:
    config = RunConfig()
    assert padded_vocabulary(config, 2001) == 2048
    wide = replace(config, model=replace(config.model, vocab_size=102_400))
    assert padded_vocabulary(wide, 16_000) == 102_400
    with pytest.raises(ValueError, match=r"model\.vocab_size is 102400: the tokenizer has 200000"):
        padded_vocabulary(wide, 200_000)


def test_checking_a_config_needs_no_torch() -> None:
    code = "import sys, coe_megatron.config, coe_megatron.estimate.run_shape; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_override_reaches_into_a_list(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data: {blend: [{path: a, weight: 1}, {path: b, weight: 2}], samples: packed}")
    blend = load(path, ["data.blend.1.path=c", "data.blend.0.weight=3"]).data.blend
    assert [(part.path, part.weight) for part in blend or []] == [("a", 3), ("c", 2)]
    with pytest.raises(ConfigError, match=r"^override 'data.blend.2.path=d': data.blend has 2 entries"):
        load(path, ["data.blend.2.path=d"])
