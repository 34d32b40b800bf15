"""Mistakes in config, data and tokenizer: one line on stderr that names the field or file and what would be valid."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import ROOT, python, torchrun

from coe_megatron.data.manifest import MANIFEST, TOKENIZER
from coe_megatron.data.prepare import prepare
from coe_megatron.data.prepare_settings import PrepareSettings

PROGRAM = ROOT / "launch" / "pretrain_coe.py"
BEGIN = "pretrain_coe.py: error: "
CONFIG = """\
output: runs/mistakes
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 16, vocab_size: 512}
moe: {num_experts: 8, topk: 2, ffn_hidden_size: 16}
training: {steps: 12, global_batch: 16, micro_batch: 4, milestones: [6]}
"""

OVERRIDES: list[tuple[str, str]] = [
    # keys
    ("modle.hidden_size=3", "modle is not a setting; did you mean model?"),
    ("moe.top_k=3", "moe.top_k is not a setting; did you mean moe.topk?"),
    ("model.mla.kv_lora=3", "model.mla.kv_lora is not a setting; did you mean model.mla.kv_lora_rank?"),
    ("logging.wandbs=true", "logging.wandbs is not a setting; did you mean logging.wandb?"),
    ("data.blend=[{path: a, wieght: 1}]", "data.blend.0.wieght is not a setting; did you mean data.blend.0.weight?"),
    ("training.world_size=2", "training.world_size is not a setting; did you mean parallel.world_size?"),
    ("model.topk=2", "model.topk is not a setting; did you mean moe.topk?"),
    ("num_layers=2", "num_layers is not a setting; did you mean model.num_layers?"),
    ("chain.path=a", "chain.path is not a setting; did you mean data.path or data.blend.N.path?"),
    ("chain.zzz=2", "chain.zzz is not a setting; valid keys: iterations, gating, residual"),
    ("base=other.yaml", "override 'base=other.yaml': base is allowed only in a config file"),
    # overrides
    ("topk", "override 'topk': write it as key.sub=value"),
    ("=3", "override '=3': write it as key.sub=value"),
    ("moe..topk=3", "override 'moe..topk=3': write it as key.sub=value"),
    ("moe[topk=3", "override 'moe[topk=3': write it as key.sub=value"),
    ("moe=[1", "override 'moe=[1': write it as key.sub=value, the value as in YAML (while parsing"),
    ("data.blend=[{path: a, weight: 1}] & data.blend.2.weight=5", "weight=5': data.blend has one entry (0)"),
    (
        "data.blend=[{path: a, weight: 1}, {path: b, weight: 1}] & data.blend.2.weight=5",
        "override 'data.blend.2.weight=5': data.blend has 2 entries (0 to 1)",
    ),
    ("data.blend=[{path: a, weight: 1}] & data.blend." + "9" * 5000 + ".path=x", "data.blend has one entry (0)"),
    ("training.milestones=[] & training.milestones.0=5", "training.milestones has no entries"),
    ("zero.stage=4", "zero.stage is 4: it should be 0, 1, 2 or 3"),
    ("zero.stage=0 & training.precision=bf16", "zero.stage is 0: it has no fp32 master weights"),
    ("model.backend=te", "model.backend is 'te': it should be 'local' or 'transformer_engine'"),
    ("model.backend=transformer_engine", "training.precision is fp32: with model.backend transformer_engine use bf16"),
    *(
        (f"model.backend=transformer_engine & training.precision=bf16 & {setting}", said)
        for setting, said in (
            ("moe.recompute=experts", "moe.recompute is experts: with model.backend transformer_engine use none"),
            ("model.mla={pad_values: true}", "model.mla.pad_values is true: with model.backend"),
            (
                "data.samples=packed & data.reset_at_documents=true",
                "data.reset_at_documents is true: with model.backend transformer_engine it must be false",
            ),
        )
    ),
    ("model.qk_norm_over_heads=true", "model.qk_norm_over_heads is true: it needs model.qk_layernorm, and"),
    ("model.mla={} & model.qkv_bias=true", "model.qkv_bias is true: with model.mla leave it false"),
    (
        "model.qk_layernorm=true & model.qk_norm_over_heads=true & parallel.tensor=2",
        "parallel.tensor is 2: with model.qk_norm_over_heads, whose norms see all heads, it must be 1",
    ),
    (
        "moe.num_shared_experts=0 & moe.shared_expert_gate=true",
        "moe.shared_expert_gate is true: it needs shared experts, and moe.num_shared_experts is 0",
    ),
    ("zero.stage=0 & zero.offload_optimizer=true", "zero.offload_optimizer is true: it needs zero.stage 1, 2 or 3"),
    ("zero.offload_parameters=true", "zero.offload_parameters is true: it needs zero.stage 3, not 1"),
    ("training.milestones.last=3", "override 'training.milestones.last=3': write it as key.sub=value"),
    # types
    ("moe.topk=many", "moe.topk is 'many': it should be an integer ≥ 1"),
    ("moe.topk=1k", "moe.topk is '1k': it should be an integer ≥ 1"),
    ("moe.topk=2.5", "moe.topk is 2.5: it should be an integer ≥ 1"),
    ("moe.topk=true", "moe.topk is true: it should be a number"),
    ("zero.stage=true", "zero.stage is true: it should be a number"),
    ("chain.iterations=true", "chain.iterations is true: it should be a number"),
    ("moe.topk=null", "moe.topk is null: it should be an integer ≥ 1"),
    ("moe.topk=[4]", "moe.topk is [4]: it should be an integer ≥ 1"),
    ("optimizer.lr=fast", "optimizer.lr is 'fast': it should be a number > 0"),
    ("model.qk_layernorm=maybe", "model.qk_layernorm is 'maybe': it should be true or false"),
    ("output=7", "output is 7: it should be a path"),
    ("output=''", "output is '': it should be text on one line"),
    ("optimizer.betas=0.9", "optimizer.betas is 0.9: it should be [number ≥ 0, < 1; number ≥ 0, < 1]"),
    ("optimizer.betas=[0.9]", "optimizer.betas.1 is missing: a value is required"),
    ("optimizer.betas=[0.9,0.95,0.99]", "optimizer.betas is [0.9, 0.95, 0.99]: it should have at most 2 items"),
    ("training.milestones=5", "training.milestones is 5: it should be a list of integers ≥ 1"),
    ("model.mla=true", "model.mla is true: it must be a section with the keys kv_lora_rank, q_lora_rank"),
    ("moe=7", "moe is 7: it must be a section with the keys num_experts, topk"),
    ("data.blend=[a, b]", "data.blend.0 is 'a': it must be a section with the keys path, weight"),
    ("data.blend=[{path: a}]", "data.blend.0.weight is missing: a value is required"),
    # ranges
    ("moe.topk=0", "moe.topk is 0: it should be greater than or equal to 1"),
    ("training.steps=-3", "training.steps is -3: it should be greater than or equal to 1"),
    ("model.num_layers=1_000_000", "model.num_layers is 1000000: it should be less than or equal to 10000"),
    ("training.seed=99999999999", "training.seed is 99999999999: it should be less than or equal to 2147483647"),
    ("optimizer.lr=0", "optimizer.lr is 0: it should be greater than 0"),
    ("optimizer.lr=-1e-3", "optimizer.lr is -0.001: it should be greater than 0"),
    ("optimizer.lr=.nan", "optimizer.lr is nan: it should be a finite number"),
    ("optimizer.lr=.inf", "optimizer.lr is inf: it should be a finite number"),
    ("model.mla.rotary_scaling_factor=.inf", "model.mla.rotary_scaling_factor is inf: it should be a finite number"),
    ("optimizer.warmup=100", "optimizer.warmup is 100: it should be less than 1"),
    ("optimizer.betas=[0.9,1.5]", "optimizer.betas.1 is 1.5: it should be less than 1"),
    ("chain.iterations=0", "chain.iterations is 0: it must be an integer of at least 1"),
    ("chain.iterations=2_000_000_000", "chain.iterations is 2000000000: with 2 layers it must be at most 10000"),
    ("moe.capacity_factor=0", "moe.capacity_factor is 0: it should be greater than 0"),
    ("chain.learned_scale=.inf", "chain.learned_scale is inf: it must be a finite number, or null"),
    ("chain.learned_scale=true", "chain.learned_scale is true: it should be a number"),
    (
        "chain.conditioned=true & chain.norm_placement=iteration_norm",
        "chain.conditioned is true: with chain.norm_placement iteration_norm",
    ),
    ("chain.layers=[]", "chain.layers is []: it must name layers, from 1"),
    ("chain.layers=[2,2]", "chain.layers is [2, 2]: it must name layers, from 1, and each of them once"),
    ("chain.layers=[0]", "chain.layers is [0]: it must name layers, from 1"),
    ("chain.layers=[2,true]", "chain.layers.1 is true: it should be a number"),
    ("chain.layers=2", "chain.layers is 2: it should be a list of integers"),
    ("chain.layers=[3]", "chain.layers has 3: the model has layers 1 to 2 (model.num_layers)"),
    ("chain.layers=[1] & moe.layer_freq=[0,1]", "chain.layers has 1: that layer is dense (moe.layer_freq [0, 1])"),
    ("chain.layers=[1] & chain.iterations=5", "chain.layers is [1]: layers that are no chains choose from all experts"),
    ("chain.layers=[1] & moe.num_groups=4 & moe.group_topk=1", "chain.layers is [1]: layers that are no chains"),
    ("chain.no_return=true & chain.gating=fixed", "chain.no_return is true: chain.gating fixed sends tokens back"),
    (
        "chain.no_return=true & chain.iterations=5",
        "chain.no_return is true: 5 iterations with 2 experts each need 10 experts, and a layer has 8",
    ),
    ("chain.no_return=true & moe.num_groups=4 & moe.group_topk=1", "chain.no_return is true: with groups of experts"),
    ("chain.modulation_rank=0", "chain.modulation_rank is 0: it must be an integer of at least 1, or null"),
    ("chain.modulation_rank=4 & chain.conditioned=true", "chain.modulation_rank is 4: chain.conditioned must be false"),
    ("chain.streams=1", "chain.streams is 1: it must be an integer of at least 2, or null"),
    ("chain.streams=2 & chain.iterations=1", "chain.streams is 2: it needs at least 2 iterations and inner, not 1"),
    ("chain.streams=2 & chain.residual=init", "chain.streams is 2: it needs at least 2 iterations and inner, not 2"),
    ("chain.latent=32", "chain.latent is 32: it must be below the hidden size, 32"),
    ("chain.latent=6", "chain.latent is 6: in fp32 it must be a multiple of 4"),
    ("chain.latent=8 & chain.norm_placement=iteration_norm", "chain.latent is 8: norms of chain.norm_placement iter"),
    ("chain.latent=8 & chain.layers=[1]", "chain.latent is 8: with chain.layers, whose experts must be alike"),
    ("chain.gating=other", "chain.gating is 'other': it should be 'independent', 'shared_router' or 'fixed'"),
    ("training.precision=fp16", "training.precision is 'fp16': it should be 'fp32' or 'bf16'"),
    ("zero.stage=7", "zero.stage is 7: it should be "),
    # fields against each other
    ("moe.topk=9", "moe.topk is 9: it must be at most moe.num_experts (8)"),
    ("model.num_attention_heads=3", "model.num_attention_heads is 3: it must divide model.hidden_size (32)"),
    ("model.num_query_groups=3", "model.num_query_groups is 3: it must divide model.num_attention_heads (2)"),
    ("model.hidden_size=34", "model.kv_channels is 17: rotary positions need an even head size"),
    ("moe.ffn_hidden_size=18", "moe.ffn_hidden_size is 18: in fp32 it must be a multiple of 4"),
    ("moe.num_groups=4", "moe.num_groups and moe.group_topk must be given together"),
    ("moe.num_groups=3 & moe.group_topk=1", "moe.num_groups is 3: it must divide moe.num_experts (8)"),
    ("moe.num_groups=4 & moe.group_topk=5", "moe.group_topk is 5: it must be at most moe.num_groups (4)"),
    ("moe.layer_freq=[1]", "moe.layer_freq has 1 entries: it must have one per layer (2)"),
    ("moe.layer_freq=[0,0]", "moe.layer_freq is [0, 0]: at least one layer must have experts"),
    ("moe.expert_bias=true", "moe.expert_bias is true: it needs moe.score_function sigmoid, not softmax"),
    ("moe.capacity_factor=2 & moe.dispatcher=deduplicated", "moe.capacity_factor is given: it needs moe.dispatcher"),
    (
        "moe.dispatcher=allgather & moe.overlap_chunks=2",
        "moe.overlap_chunks is 2: it must be 1 with moe.dispatcher allgather",
    ),
    ("moe.dispatcher=fast", "moe.dispatcher is 'fast': it should be 'alltoall', 'deduplicated', 'allgather' or 'auto'"),
    ("moe.overlap_chunks=many", "moe.overlap_chunks is 'many': it should be an integer ≥ 1 or auto"),
    ("moe.overlap_chunks=0", "moe.overlap_chunks is 0: it should be greater than or equal to 1"),
    ("parallel.network=none.json", "parallel.network is none.json: there is no such file"),
    ("parallel.network=.", "parallel.network is .: it is a folder, where a file is needed"),
    ("moe.pad_to_capacity=true", "moe.pad_to_capacity is true: it needs a moe.capacity_factor"),
    ("parallel.expert=3", "parallel.expert is 3: it must divide moe.num_experts (8)"),
    ("parallel.world_size=3", "training.global_batch is 16: it must be a multiple of training.micro_batch x"),
    (
        "parallel.expert=2 & parallel.world_size=3",
        "parallel.expert is 2: the number of ranks (3) must be a multiple of 2; start 2 "
        "(torchrun --nproc-per-node 2) or set parallel.expert=1",
    ),
    ("parallel.expert=8", "training.global_batch is 16: it must be a multiple of training.micro_batch x"),
    ("parallel.tensor=4", "parallel.tensor is 4: it must divide model.num_attention_heads (2)"),
    ("parallel.tensor=2 & model.seq_length=33", "parallel.tensor is 2: it must divide model.seq_length (33)"),
    ("parallel.expert_tensor=8", "parallel.expert_tensor is 8: it must cut moe.ffn_hidden_size (16) into multiples"),
    ("parallel.pipeline=3", "parallel.pipeline is 3: it must divide model.num_layers (2)"),
    ("parallel.pipeline=2 & zero.stage=3", "zero.stage is 3: with parallel.pipeline (2) it must be 0 or 1, because"),
    ("parallel.pipeline=2 & model.untied_embeddings=false", "model.untied_embeddings is false: with parallel.pipeline"),
    (
        "parallel.tensor=2 & model.mla={kv_lora_rank: 63, qk_pos_emb_head_dim: 16}",
        "parallel.tensor is 2: it must divide model.mla.kv_lora_rank + qk_pos_emb_head_dim (79)",
    ),
    ("parallel.tensor=2 & model.mla={q_lora_rank: 33}", "parallel.tensor is 2: it must divide model.mla.q_lora_rank"),
    (
        "parallel.pipeline=2 & parallel.expert=2 & moe.layer_freq=[0,1] & zero.offload_optimizer=true",
        "zero.offload_optimizer is true: with parallel.pipeline (2) each stage needs a layer with experts, not ",
    ),
    ("parallel.x=2", "parallel.x is not a setting; valid keys: tensor, context, pipeline, virtual_pipeline, expert"),
    (
        "parallel.tensor=2 & parallel.context=2 & model.seq_length=20",
        "parallel.context is 2: model.seq_length (20) must be a multiple of 8, 2 x parallel.context x parallel.tensor",
    ),
    ("parallel.context=2 & model.seq_length=18", "parallel.context is 2: model.seq_length (18) must be a multiple of"),
    (
        "parallel.tensor=2 & parallel.pipeline=2 & parallel.world_size=6",
        "parallel.tensor is 2 and parallel.pipeline is 2: the number of ranks (6) must be a multiple of 4; start "
        "4 (torchrun --nproc-per-node 4) or set parallel.tensor=1 parallel.pipeline=1",
    ),
    ("training.micro_batch=5", "training.micro_batch is 5: it must divide training.global_batch (16)"),
    ("optimizer.min_lr=1", "optimizer.min_lr is 1.0: it must be at most optimizer.lr (0.0003)"),
    ("optimizer.min_lr=1e-5", "optimizer.min_lr is 1e-05: with optimizer.decay constant it has no meaning, use 0"),
    ("optimizer.decay=wsd & optimizer.cooldown=0.95", "optimizer.cooldown is 0.95: with optimizer.warmup (0.1)"),
    ("training.milestones=[13]", "training.milestones has 13: the run ends with step 12 (training.steps)"),
    ("profile.first_step=13", "profile.first_step is 13: the run ends with step 12 (training.steps)"),
    ("profile.first_step=2 & profile.ranks=[]", "profile.ranks is []: it must name at least one rank"),
    (
        "profile.first_step=2 & profile.ranks=[4] & parallel.world_size=4",
        "profile.ranks is [4]: the run has ranks 0 to 3",
    ),
    ("training.warm_start=runs/mistakes", "training.warm_start is runs/mistakes: it must name another run than output"),
    ("training.branch_from=runs/mistakes", "training.branch_from is runs/mistakes: it must name another run than"),
    ("data.reset_at_documents=true", "data.reset_at_documents is true: it requires data.samples packed"),
    (
        "data.samples=packed & data.answer_tokens=1",
        "data.answer_tokens is 1: it requires data.samples row, or leave it null",
    ),
    ("data.answer_tokens=0", "data.answer_tokens is 0"),
    ("data.blend=[]", "data.blend is []: it must name at least one folder, or be null"),
    ("data.validation={a/b: x}", "data.validation has the name 'a/b': a name is text on one line without slashes"),
    # what refers to something else
    ("moe.topk=${moe.nothing}", "moe.topk has no value: Interpolation key 'moe.nothing' not found"),
    ("moe.topk=${oc.env:NO_SUCH_VARIABLE}", "moe.topk has no value: "),
    ("moe.scaling=???", "moe.scaling has no value: "),
]  # fmt: skip

FILES: dict[str, tuple[str | bytes, str]] = {
    "a tab": ("model:\n\tseq_length: 3\n", "config.yaml: not valid YAML: while scanning"),
    "a bracket": ("model: {seq_length: 3\n", "config.yaml: not valid YAML: while parsing"),
    "a key twice": ("model: {}\nmodel: {}\n", "found duplicate key model"),
    "two documents": ("model: {}\n---\nmodel: {}\n", "not valid YAML: expected a single document"),
    "a list": ("- 1\n- 2\n", "config.yaml: a config must be a mapping of keys to values"),
    "a number": ("7\n", "config.yaml: a config must be a mapping of keys to values"),
    "text": ("model\n", "config.yaml: a config must be a mapping of keys to values"),
    "nothing": ("# all of it\n", "config.yaml: a config must be a mapping of keys to values"),
    "other encoding": ("model: {}".encode("utf-16"), "config.yaml: cannot be read: it must be text in UTF-8"),
    "a dotted key": ("model.seq_length: 3\n", "'model.seq_length' is not a setting; valid keys: output, model"),
    "a number as key": ("model: {1: 2}\n", "model.1 is not a setting; valid keys: num_layers"),
    "a section without keys": ("model:\n", "model is null: it must be a section with the keys num_layers"),
    "an unclosed reference": ("moe: {topk: '${moe.'}\n", "config.yaml: moe.topk is not valid: "),
    "many digits": ("moe: {topk: " + "9" * 5000 + "}\n", "config.yaml: not valid YAML: "),
    "a line break in text": ('output: "a\\nb"\n', "output is 'a\\nb': it should be text on one line"),
    "a line break in a key": ('data: {validation: {"a\\nb": "${"}}\n', "data.validation.a\\nb is not valid: "),
    "itself as base": ("base: config.yaml\n", "config.yaml: base leads back to this file"),
    "a base in a circle": ("base: circle.yaml\n", "base leads back to this file: config.yaml -> circle.yaml"),
    "no such base": ("base: none.yaml\n", "none.yaml: there is no such file"),
    "a number as base": ("base: 7\n", "config.yaml: base is 7: it must name a file or a list of files"),
}

main = runpy.run_path(str(PROGRAM))["main"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which the program refuses, without its beginning; the status is 2 and stdout is empty."""
    with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(PROGRAM)])
        main([str(argument) for argument in arguments])
    out, said = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    return one_line(said)


def one_line(said: str) -> str:
    assert said.startswith(BEGIN) and said.endswith("\n"), said
    line = said.removeprefix(BEGIN).removesuffix("\n")
    assert line.isprintable(), said
    return line


@pytest.mark.parametrize(("override", "said"), OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_a_mistake_in_an_override(override: str, said: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [config, *override.split(" & ")]
    told = refused(capsys, *arguments, "--dry-run")
    assert said in told
    if "parallel" not in override:  # a run compares that with its ranks first
        assert refused(capsys, *arguments) == told


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_a_file(name: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, said = FILES[name]
    config.write_bytes(content.encode() if isinstance(content, str) else content)
    (config.parent / "circle.yaml").write_text("base: config.yaml\n")
    told = refused(capsys, config, "--dry-run")
    assert said in told
    assert refused(capsys, config) == told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.yaml"], "none.yaml: there is no such file"),
        ([ROOT], "it is a folder, where a file is needed"),
        ([], "the following arguments are required: config"),
        (["{config}", "--jsn"], "unrecognized arguments: --jsn"),
        (["{config}", "--a\nb"], "unrecognized arguments: --a\\nb"),
    ],
)
def test_a_mistake_in_the_command(
    arguments: list[object], said: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *(str(part).format(config=config) for part in arguments), "--dry-run")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prepared folders, a and b, each with a tokenizer of its own."""
    parent = tmp_path_factory.mktemp("prepared")
    for name in ("a", "b"):
        text = parent / f"{name}.jsonl"
        text.write_text("".join(json.dumps({"text": f"{name} has {n} apples"}) + "\n" for n in range(40)))
        prepare(PrepareSettings(output=parent / name, inputs=(text,), vocab_size=290, valid_fraction=0.2))
    return parent


def cut(folder: Path) -> None:
    os.truncate(folder / "train.bin", 10)


def rewrite(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | changes))

    return change


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def swap_tokenizers(folder: Path) -> None:
    shutil.copy(folder.parent / "b" / TOKENIZER, folder / TOKENIZER)


def garble_tokenizer(folder: Path) -> None:
    (folder / TOKENIZER).write_bytes(bytes((folder / TOKENIZER).stat().st_size))


def nothing(folder: Path) -> None:
    pass


DATA: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "file cut": (cut, "", "data.path: {a} is incomplete: train.bin has 10 bytes instead of"),
    "file missing": (lambda folder: (folder / "valid.idx").unlink(), "", "valid.idx is missing; prepare it again"),
    "manifest missing": (lambda folder: (folder / MANIFEST).unlink(), "", "data.path: {a} is not prepared data"),
    "manifest no JSON": (replace(MANIFEST, b"{"), "", "manifest.json is not a manifest of format coe_megatron.data"),
    "manifest null": (replace(MANIFEST, b"null"), "", "coe_megatron.data, version 2: it is not a JSON object"),
    "manifest no text": (replace(MANIFEST, b"\xff"), "", "data.path: {a}/manifest.json is not a manifest"),
    "other version": (rewrite(version=7), "", "is not a manifest of format coe_megatron.data, version 2: it is format"),
    "other type": (rewrite(vocab_size="many"), "", "version 2: vocab_size: Input should be a valid integer"),
    "no splits": (rewrite(splits={}), "", "version 2: splits has no train"),
    "tokenizer of other data": (swap_tokenizers, "", "tokenizer.model"),
    "tokenizer no model": (garble_tokenizer, "", "tokenizer.model is not the tokenizer this data was prepared with"),
    "vocabulary too small": (nothing, "model.vocab_size=64", "model.vocab_size is 64: the tokenizer has 290 pieces"),
    "samples too long": (
        nothing,
        "data.samples=packed & model.seq_length=100000",
        "model.seq_length is 100000: packed samples need more tokens than {a} has",
    ),
    "another file than the node check's report": (
        nothing,
        "parallel.network={a}/manifest.json",
        "parallel.network is {a}/manifest.json: it is not a report of this version's launch/check_nodes.py: nodes: F",
    ),
    "blend of tokenizers": (
        nothing,
        "data.blend=[{{path: {a}, weight: 1}}, {{path: {b}, weight: 1}}]",
        "data.blend.1.path is {b}: its tokenizer differs from that of data.blend.0.path",
    ),
    "validation of another tokenizer": (
        nothing,
        "data.validation={{far: {b}}}",
        "data.validation.far is {b}: its tokenizer differs from that of data.path",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_a_mistake_in_the_data(
    name: str, config: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, overrides, said = DATA[name]
    a, b = (shutil.copytree(prepared / folder, tmp_path / folder) for folder in "ab")
    spoil(a)
    arguments = [config, f"data.path={a}", *filter(None, overrides.format(a=a, b=b).split(" & "))]
    told = refused(capsys, *arguments, "--dry-run")
    assert said.format(a=a, b=b) in told
    assert refused(capsys, *arguments) == told


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.path=nowhere"], "data.path: nowhere is not prepared data: it has no manifest.json"),
        (["data.blend=[{path: nowhere, weight: 1}]"], "data.blend.0.path: nowhere is not prepared data"),
        (["data.path={a}", "data.validation={far: nowhere}"], "data.validation.far: nowhere is not prepared data"),
    ],
)
def test_missing_data_is_a_mistake_where_it_is_needed(
    overrides: list[str], said: str, config: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(config), *(override.replace("{a}", str(prepared / "a")) for override in overrides)]
    assert said in refused(capsys, *arguments)
    assert main([*arguments, "--dry-run"]) == 0
    capsys.readouterr()
    if "{a}" not in overrides[0]:
        told = refused(capsys, *arguments, "model.vocab_size=null", "--dry-run")
        assert told.startswith("model.vocab_size is null: without prepared data it must be set")


def test_there_are_forty_different_ones() -> None:
    assert len({said for _, said in OVERRIDES} | set(FILES) | set(DATA)) >= 40


@pytest.mark.thorough
@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(("override", "said"), [OVERRIDES[1], ("data.path={a}", "train.bin has 10 bytes instead of")])
def test_the_program_itself(override: str, said: str, dry: bool, config: Path, prepared: Path, tmp_path: Path) -> None:
    cut(shutil.copytree(prepared / "a", tmp_path / "a"))
    arguments = [PROGRAM, config, override.format(a=tmp_path / "a"), *(["--dry-run"] if dry else [])]
    done = python(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in one_line(done.stderr)


def test_no_mistake_needs_torch(config: Path, prepared: Path, tmp_path: Path) -> None:
    cut(shutil.copytree(prepared / "a", tmp_path / "a"))
    ways = [
        [str(config), "moe.topk=9"],
        [str(config), f"data.path={tmp_path / 'a'}"],
        [str(config), "data.path=nowhere"],
    ]
    code = f"""
import contextlib, runpy, sys
sys.argv = [{str(PROGRAM)!r}]
main = runpy.run_path({str(PROGRAM)!r})["main"]
for arguments in {ways!r}:
    with contextlib.suppress(SystemExit):
        main(arguments)
main([{str(config)!r}, "data.path=nowhere", "--dry-run"])
sys.exit(bool({{"torch", "megatron", "deepspeed"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr.count(BEGIN) == len(ways), done.stderr


@pytest.mark.ranks
@pytest.mark.parametrize(("override", "said"), [OVERRIDES[1], ("data.path={a}", "train.bin has 10 bytes instead of")])
def test_under_torchrun_rank_0_says_it_once(
    override: str, said: str, config: Path, prepared: Path, tmp_path: Path
) -> None:
    cut(shutil.copytree(prepared / "a", tmp_path / "a"))
    done = torchrun(PROGRAM, config, override.format(a=tmp_path / "a"), seconds=60)
    assert done.returncode != 0 and done.stdout == ""
    ours = [line for line in done.stderr.splitlines() if "traceback :" not in line]  # where torchrun reports it too
    assert [line.startswith(BEGIN) for line in ours if said in line] == [True]
    assert done.stderr.count(BEGIN) == 1
    assert 'pretrain_coe.py", line' not in done.stderr  # torchrun's own traceback is another


@pytest.mark.ranks
def test_under_torchrun_rank_0_alone_says_what_a_run_costs(config: Path) -> None:
    done = torchrun(PROGRAM, config, "data.path=nowhere", "--dry-run", seconds=60)
    assert done.returncode == 0 and done.stdout.count("tokens per step") == 1
