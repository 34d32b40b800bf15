"""Command lines of Megatron-LM as configs: three of real models, single flags, mistakes, and the table itself."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from megatron_commands import DEEPSEEK, MIXTRAL, QWEN

from coe_megatron.config import flat, load
from coe_megatron.config.from_megatron import translate, words
from coe_megatron.config.megatron_flags import FLAGS, MARK, TORCHRUN, flag_table
from coe_megatron.config.settings import RunConfig
from coe_megatron.errors import ConfigError

ROOT = Path(__file__).parents[2]
SMALLEST = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --num-experts 8 --lr 1e-3 "
    "--train-iters 100 --micro-batch-size 2 --global-batch-size 8"
)


def read(text: str, tmp_path: Path) -> tuple[RunConfig, str]:
    """The config that our loader reads from what is printed, and the comments."""
    path = tmp_path / "config.yaml"
    found = translate(words(text))
    path.write_text(yaml.safe_dump(found.nested()))
    return load(path), "\n".join(found.notes)


def test_a_mixtral_command(tmp_path: Path) -> None:
    config, notes = read(MIXTRAL, tmp_path)
    model, moe, parallel = config.model, config.moe, config.parallel
    assert (model.num_layers, model.hidden_size, model.num_query_groups, model.rotary_base) == (32, 4096, 8, 1_000_000)
    assert (model.normalization, model.activation, model.untied_embeddings) == ("RMSNorm", "swiglu", True)
    assert (moe.num_experts, moe.topk, moe.ffn_hidden_size, moe.num_shared_experts) == (8, 2, 14336, 0)
    assert (moe.renormalise, moe.load_balancing, moe.aux_loss_coeff, moe.dispatcher) == (
        True,
        "aux_loss",
        0.01,
        "alltoall",
    )
    assert (parallel.pipeline, parallel.expert, parallel.world_size, parallel.ranks_per_node) == (4, 8, 32, 8)
    assert (config.training.global_batch, config.training.precision, config.chain.iterations) == (256, "bf16", 1)
    assert config.optimizer.warmup == 500 / 500_000 and config.optimizer.betas == (0.9, 0.999)
    assert "--save $CHECKPOINTS: this shell variable has no value here" in notes
    assert "--lr-decay-iters 320000: the learning rate decays until the last of the 500000 steps" in notes
    assert "--data-path $DATA: prepare the text" in notes
    assert notes.count("\n") == 5, notes


def test_a_qwen_command(tmp_path: Path) -> None:
    config, notes = read(QWEN, tmp_path)
    moe = config.moe
    assert (moe.num_experts, moe.topk, moe.ffn_hidden_size, moe.num_shared_experts) == (60, 4, 1408, 4)
    assert (moe.renormalise, moe.load_balancing, moe.z_loss_coeff, moe.recompute) == (
        False,
        "global_aux_loss",
        1e-3,
        "layer",
    )
    assert config.model.vocab_size == 151_680 and config.model.layernorm_epsilon == 1e-6
    steps = 1_000_000 // 512
    assert config.training.steps == steps
    assert (config.optimizer.decay, config.optimizer.cooldown) == ("wsd", (200_000 // 512) / steps)
    assert config.optimizer.warmup == 40 / steps
    assert config.parallel.world_size == 8
    assert config.model.qkv_bias and moe.shared_expert_gate
    assert "--recompute-modules core_attn" in notes and notes.count("\n") == 0, notes


def test_a_deepseek_command(tmp_path: Path) -> None:
    config, notes = read(DEEPSEEK, tmp_path)
    mla, moe = config.model.mla, config.moe
    assert mla is not None and (mla.kv_lora_rank, mla.q_lora_rank, mla.rotary_scaling_factor) == (512, None, 40)
    assert moe.layer_freq == [0] + [1] * 26 and (moe.num_groups, moe.group_topk) == (8, 3)
    assert (moe.num_shared_experts, moe.dispatcher) == (2, "alltoall")
    assert (config.chain.iterations, config.chain.norm_placement) == (2, "iteration_norm")
    assert config.parallel.context == 2
    for flag in ("--moe-token-dispatcher-type flex", "--moe-enable-deepep", "--mtp-num-layers 1"):
        assert flag in notes
    assert notes.count("\n") == 2, notes


@pytest.mark.parametrize(
    ("more", "setting", "value"),
    [
        ("", "model.normalization", "LayerNorm"),
        ("", "model.activation", "gelu"),
        ("", "model.hidden_dropout", 0.1),
        ("", "model.layernorm_epsilon", 1e-5),
        ("", "model.ffn_hidden_size", 256),
        ("--swiglu", "model.ffn_hidden_size", 128),
        ("", "moe.ffn_hidden_size", 256),
        ("", "moe.aux_loss_coeff", 0.0),
        ("", "moe.dispatcher", "allgather"),
        ("", "optimizer.decay", "linear"),
        ("", "optimizer.warmup", 0.0),
        ("--lr-warmup-fraction 0.5 --lr-decay-iters 50", "optimizer.warmup", 0.25),
        ("", "training.precision", "fp32"),
        ("", "chain.iterations", 1),
        ("--coe-gating fixed", "chain.gating", "fixed"),
        ("--coe-no-return", "chain.no_return", True),
        ("--coe-layers 1 2", "chain.layers", [1, 2]),
        ("--coe-learned-scale 0.5", "chain.learned_scale", 0.5),
        ("--coe-recompute layer", "moe.recompute", "layer"),
        ("--coe-overlap-chunks 2", "moe.overlap_chunks", 2),
        ("--num-virtual-stages-per-pipeline-rank 2", "parallel.virtual_pipeline", 2),
        ("--num-layers-per-virtual-pipeline-stage 1", "parallel.virtual_pipeline", 2),
        ("--context-parallel-size 2", "parallel.context", 2),
        ("--spec coe_megatron.megatron_lm coe_spec", "chain.iterations", None),
        ("--tensor-model-parallel-size 2", "parallel.expert_tensor", 2),
        ("--clip-grad 0", "optimizer.clip", None),
        ("--lr 1e-3 --lr 2e-3", "optimizer.lr", 2e-3),
        ("--save=runs/a", "output", "runs/a"),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads", "zero.stage", 2),
        ("--reset-position-ids --reset-attention-mask", "data.reset_at_documents", True),
    ],
)  # fmt: skip
def test_a_flag_or_a_default_of_megatrons(more: str, setting: str, value: Any) -> None:
    assert translate(f"{SMALLEST} {more}".split()).settings.get(setting) == value


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ("--swigluu", "--swigluu: unknown here; did you mean --swiglu?"),
        ("--some-thing 1 2", "--some-thing 1 2: unknown here"),
        ("--squared-relu", "--squared-relu: model.activation is swiglu or gelu"),
        ("--fp16", "--fp16: training.precision is fp32 or bf16"),
        ("", "without --disable-bias-linear"),
        ("", "--position-embedding-type learned_absolute"),
        ("--reset-position-ids", "--reset-position-ids: data.reset_at_documents resets"),
        ("--moe-router-load-balancing-type sinkhorn", "--moe-router-load-balancing-type sinkhorn: there is one"),
        ("--moe-shared-expert-intermediate-size 100", "it must be a multiple of an expert's width 256"),
        ("--optimizer muon", "--optimizer muon: the optimizer is AdamW"),
        ("--recompute-granularity full --recompute-method uniform", "--recompute-granularity full"),
        ("--load elsewhere", "--load elsewhere: training.warm_start"),
        ("--wandb-project x", "--wandb-project: set WANDB_PROJECT"),
    ],
)
def test_what_has_no_counterpart_is_named(more: str, note: str) -> None:
    assert any(line.startswith(note) or note in line for line in translate(f"{SMALLEST} {more}".split()).notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALLEST.replace("--num-experts 8", ""), "--num-experts is missing: only models with experts"),
        (SMALLEST.replace("--seq-length 128", ""), "--seq-length is missing"),
        (SMALLEST.replace("--train-iters 100", ""), "--train-iters is missing"),
        (SMALLEST.replace("--global-batch-size 8", ""), "--global-batch-size is missing"),
        (SMALLEST.replace("--num-layers 2", "--num-layers two"), "--num-layers is 'two': it must be an integer"),
        (SMALLEST.replace("--lr 1e-3", "--lr"), "--lr has no value"),
        (f"{SMALLEST} --moe-layer-freq [2]", "--moe-layer-freq is '[2]'"),
        (f"{SMALLEST} --moe-ffn-hidden-size 0", "--moe-ffn-hidden-size is 0: it must be at least 1"),
        (f"{SMALLEST} --train-iters 1e99", "--train-iters is '1e99': it must be an integer"),
        ("A=----------; " + "A=$A$A " * 20, "the command has more than 131,072 characters"),
        (f"{SMALLEST} --save 'x", "the command cannot be read: No closing quotation"),
    ],
)
def test_a_mistake_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translate(words(text))
    assert str(caught.value).startswith(message)


def test_the_global_batch_follows_from_torchruns_ranks() -> None:
    text = SMALLEST.replace("--global-batch-size 8", "--nproc-per-node 8 --nnodes 2 --tensor-model-parallel-size 2")
    assert translate(words(text)).settings["training.global_batch"] == 16


@pytest.mark.run
def test_the_program(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "launch" / "from_megatron.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    script = tmp_path / "mixtral.sh"
    script.write_text(MIXTRAL)
    done = run(str(script))
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("# Without a counterpart:\n# --data-path $DATA")
    printed = tmp_path / "printed.yaml"
    printed.write_text(done.stdout)
    assert load(printed).moe.num_experts == 8
    assert run("--", *SMALLEST.split()).returncode == 0
    wrong = run("--", *SMALLEST.split(), "--moe-router-topk", "9")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "moe.topk" in wrong.stderr
    assert run().returncode == run(str(tmp_path / "none")).returncode == 2


def test_every_setting_of_the_table_is_one() -> None:
    known = flat(RunConfig())
    for name, flag in FLAGS.items():
        if flag.setting and not flag.setting.startswith(("always", "a run", "model.mla")):
            assert flag.setting in known, name


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "from-megatron.md").read_text()
    assert page.endswith(MARK + flag_table()), "run: make docs"


def test_the_table_is_true_of_megatron() -> None:
    """Every flag exists, with or without a value as the table says, and with its default."""
    arguments = pytest.importorskip("megatron.training.arguments", reason="0.16.1 has no megatron.training")
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser())
    known = {name: action for action in parser._actions for name in action.option_strings}
    for name, flag in FLAGS.items():
        if name.startswith("--coe-") or name in TORCHRUN:
            continue
        assert name in known, name
        takes_value = known[name].nargs != 0
        assert (flag.read is None and flag.on is None) or takes_value == (flag.read is not None), name
        if flag.read is not None and flag.default is not None:
            assert known[name].default == flag.default, name
