"""The main program from start to end on two gloo ranks: trains, stops, goes on, and says what is wrong."""

import gzip
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from programs import ROOT, children, kill, python, start_torchrun, torchrun, wait_for_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coe_megatron.config import RunConfig, load
from coe_megatron.estimate.machine import machine
from coe_megatron.run import folder as run_folder
from coe_megatron.run.metrics_log import read_metrics
from coe_megatron.study.plan.amounts import Amounts
from coe_megatron.study.plan.calibration import calibrate

BYTES = 2.0  # a token, about, of 512 pieces
NO_DROPOUT = ("model.hidden_dropout=0", "model.attention_dropout=0")
pytestmark = [pytest.mark.run, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def other_data(prepared: Path) -> Path:
    """Text of another seed, and so another tokenizer of the same size."""
    folder = prepared.parent / "other"
    done = python("launch/prepare_data.py", "--builtin", 400, "--seed", 9, "--vocab-size", 512, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def same_tokenizer(prepared: Path) -> Path:
    """Other text, prepared with the first one's tokenizer."""
    folder, tokenizer = prepared.parent / "more", prepared / "tokenizer.model"
    done = python("launch/prepare_data.py", "--builtin", 60, "--seed", 5, "--tokenizer", tokenizer, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_recomputing_changes_no_loss_and_no_gradient(finished: Path, config: Path, prepared: Path) -> None:
    """Through ZeRO, accumulation, dropout and expert parallelism; fp32, so to the last bit."""
    folder = prepared.parent / "recomputed"
    settings = (f"data.path={prepared}", f"output={folder}", "moe.recompute=iteration")
    done = torchrun("launch/pretrain_coe.py", config, *settings)
    assert done.returncode == 0, done.stderr
    lines = zip(*(read_metrics(path / "metrics.jsonl") for path in (folder, finished)), strict=True)
    for found, plain in lines:
        for name in ("train_loss", "valid_loss", "grad_norm", "aux_loss", "routing"):
            assert found.get(name) == plain.get(name)


def test_a_run_leaves_everything_it_should(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(13))
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 6, 12]
    assert lines[-1]["valid_loss"] < lines[0]["valid_loss"] - 0.2
    assert lines[-1]["valid_bits_per_byte"] == pytest.approx(lines[-1]["valid_loss"] / 0.6931 / BYTES, rel=0.2)
    assert {"tokens", "grad_norm", "aux_loss", "tokens_per_second", "tflops", "memory"} <= lines[-1].keys()
    routers = [(part["layer"], part["iteration"]) for part in lines[-1]["routing"]]
    assert routers == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(abs(sum(part["load"]) - 1) < 1e-5 for part in lines[-1]["routing"])
    assert [part["overlap"] is None for part in lines[-1]["routing"]] == [True, False] * 2
    assert [part.get("pairs") is None for line in lines[1:] for part in line["routing"]] == [True] * 45 + [
        False,
        True,
        False,
    ]
    first = lines[1]  # near initialisation a router has next to no preference, and chance alone repeats choices
    assert first["routing_entropy"] == pytest.approx(math.log(8), abs=0.1)
    assert first["routing_overlap"] == pytest.approx(2 / 8, abs=0.2)
    assert first["routing_dropped"] == 0.0 and first["routing_load_max_over_mean"] > 1.0
    record = json.loads((finished / "run.json").read_text())
    for line in lines[1:]:  # the closed form for all positions of a batch, padding too, on one of the two ranks
        achieved = record["flops_per_token"] * 16 * 32 / line["step_seconds"] / 2
        assert line["tflops"] == pytest.approx(achieved / 1e12) and "mfu" not in line
    assert lines[1]["eta_seconds"] > lines[-2]["eta_seconds"] > lines[-1]["eta_seconds"] == 0.0
    assert list((finished / "tensorboard").iterdir())
    assert (finished / "loss.png").stat().st_size > 10_000
    assert '"outcome": "finished"' in (finished / "run.json").read_text()
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == ["step-00000008", "step-00000012"]


def test_a_finished_run_tells_how_long_it_took(finished: Path) -> None:
    """Start-up is what steps, evaluations and checkpoints leave of its time, if they leave any."""
    speed = calibrate(finished, machine("cpu"))
    attempt = json.loads((finished / "run.json").read_text())["attempts"][-1]
    began, ended = (datetime.fromisoformat(attempt[name]) for name in ("began", "ended"))
    config = load(finished / "config.yaml", ["parallel.world_size=2"])
    estimated = Amounts(speed).run(config).seconds
    assert speed.saving is not None and min(speed.factor, speed.saving, estimated.evaluations) > 0
    in_steps = sum(line["step_seconds"] for line in read_metrics(finished / "metrics.jsonl")[1:])
    took = (ended - began).total_seconds()
    beside = estimated.evaluations + estimated.checkpoints
    assert estimated.total - estimated.steps == pytest.approx(max(took - in_steps, beside))


def test_killed_and_resumed_is_the_run_that_was_never_killed(config: Path, prepared: Path, finished: Path) -> None:
    """SIGKILL of all ranks after a checkpoint in the middle of an epoch, with dropout 0.1 and accumulation 2.

    Until then checkpoints are written in the background, after every step.
    """
    folder = prepared.parent / "killed"
    command = ("launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={folder}")
    with start_torchrun(*command, "training.background_saving=true", "training.save_every=1") as process:
        wait_for_step(folder, 5, process)
        kill(process)
    assert not (folder / "checkpoints" / "step-00000012").exists()

    done = torchrun(*command)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr
    never_killed, killed = (read_metrics(path / "metrics.jsonl") for path in (finished, folder))
    assert [line["step"] for line in killed] == list(range(13))
    for expected, found in zip(never_killed, killed, strict=True):
        for name in ("tokens", "train_loss", "valid_loss", "grad_norm", "aux_loss", "learning_rate"):
            assert found.get(name) == expected.get(name), (expected["step"], name)


def test_a_finished_run_started_again_has_nothing_to_do(config: Path, prepared: Path, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_text()
    done = torchrun("launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={finished}")
    assert done.returncode == 0, done.stderr
    assert "already finished at step 12; increase training.steps to continue" in done.stderr
    assert (finished / "metrics.jsonl").read_text() == before


def start_python(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("moe.topk=9", "moe.topk is 9: it must be at most moe.num_experts (8)"),
        (
            "output=Makefile/run",
            "output is Makefile/run: it cannot be used: not a directory",
        ),  # which rank 0 alone finds out
    ],
)
def test_a_mistake_is_said_once_by_rank_0(mistake: str, said: str, config: Path, prepared: Path) -> None:
    done = torchrun("launch/pretrain_coe.py", config, f"data.path={prepared}", mistake)
    assert done.returncode != 0
    assert done.stderr.count("pretrain_coe.py: error: ") == done.stderr.count(f"pretrain_coe.py: error: {said}") == 1
    assert 'pretrain_coe.py", line' not in done.stderr  # the traceback that torchrun prints is its own


def test_a_second_run_with_the_output_of_another_is_refused(config: Path, prepared: Path, tmp_path: Path) -> None:
    with run_folder.begin(RunConfig(output=str(tmp_path))):
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        settings = (f"data.path={prepared}", f"output={tmp_path}", "parallel.expert=1")
        done = python("launch/pretrain_coe.py", config, *settings)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert done.returncode == 6 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"pretrain_coe.py: error: output is {tmp_path}: another run has locked it, process ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("missing.yaml",), "the config file is missing.yaml: there is no such file"),
        (("configs/quickstart.yaml", "parallel.expert=1", "data.path=nowhere"), "nowhere"),
        (("configs/quickstart.yaml", "parallel.expert=1", "model.seq_lenth=9"), "did you mean model.seq_length?"),
        (("configs/quickstart.yaml", "parallel.expert=1", "--jsn"), "unrecognized arguments: --jsn"),
        (("configs/quickstart.yaml", "--json"), "--json needs --dry-run"),
        (("configs/quickstart.yaml", "--device-memory", "80GiB"), "--device-memory needs --dry-run"),
        (
            ("configs/1024-gpus.yaml", "data.path=nowhere", "--dry-run", "--device-memory", "30 GiB"),
            "--device-memory '30 GiB' must be a number above 0 and one of GiB, GB, MiB, MB, such as 80GiB",
        ),
        (
            ("configs/1024-gpus.yaml", "data.path=nowhere", "--dry-run", "--device-memory", "30GiB"),
            "--device-memory 30GiB: a rank needs 50.1 GiB, most of it activations (47.7 GiB); "
            "training.micro_batch=1 would fit",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = python("launch/pretrain_coe.py", *arguments, *_into(tmp_path, arguments))
    assert done.returncode == 2
    assert (
        done.stderr.startswith("pretrain_coe.py: error: ") and done.stderr.count("\n") == 1 and said in done.stderr
    ), done.stderr


def test_an_output_that_cannot_be_written_is_one_line_and_exit_2(config: Path, prepared: Path) -> None:
    done = python(
        "launch/pretrain_coe.py", config, f"data.path={prepared}", "parallel.expert=1", "output=Makefile/run"
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("pretrain_coe.py: error: output is Makefile/run: it cannot be used: not a"), (
        done.stderr
    )


def _into(folder: Path, arguments: tuple[str, ...]) -> list[str]:
    return [] if len(arguments) == 1 else [f"output={folder}"]


def test_going_on_with_another_config_is_refused(config: Path, prepared: Path, finished: Path) -> None:
    done = torchrun(
        "launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={finished}", "optimizer.lr=1e-3"
    )
    assert done.returncode != 0
    assert "optimizer.lr is 0.001: the checkpoints in" in done.stderr and "were made with 0.003" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_goes_on_at_another_zero_stage(stage: int, config: Path, prepared: Path, finished: Path) -> None:
    """From step 8 of a run at stage 1, with the dropout of that run."""
    folder = shutil.copytree(finished, prepared.parent / f"stage{stage}")
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    common = ("launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={folder}")
    done = torchrun(*common, f"zero.stage={stage}")
    assert done.returncode == 0, done.stderr
    expected, found = (read_metrics(path / "metrics.jsonl") for path in (finished, folder))
    assert [line["step"] for line in found] == list(range(13)) and "resumed at step 8" in done.stderr
    for left, right in zip(expected[9:], found[9:], strict=True):
        for name in {"train_loss", "valid_loss", "grad_norm"} & left.keys():
            assert right[name] == pytest.approx(left[name], rel=1e-4), (left["step"], name)
    measured, estimated = found[-1]["memory"], found[-1]["memory_predicted"]
    for kind in ("weights", "optimizer", "gradients", "activations", "peak"):  # a tiny model; what is measured is there
        assert 0 < measured[kind] == pytest.approx(estimated[kind], rel=0.3), kind


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_and_without_a_whole_one_nothing_begins(
    config: Path, prepared: Path, finished: Path
) -> None:
    folder = shutil.copytree(finished, prepared.parent / "damaged")
    older, newer = sorted((folder / "checkpoints").iterdir())
    common = ("launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={folder}", "parallel.expert=1")
    flip_a_bit(newer / "tensors" / "__0_0.distcp")
    done = python(*common, "training.steps=9")
    assert done.returncode == 0, done.stderr
    assert f"checkpoint {newer} is skipped: the content of tensors/__0_0.distcp has changed\n" in done.stderr
    assert "resumed at step 8" in done.stderr and newer.exists()
    shutil.rmtree(folder / "checkpoints" / "step-00000009")
    flip_a_bit(older / "state.json")
    done = python(*common)
    assert done.returncode == 2
    *skipped, said = done.stderr.splitlines()
    assert all(f"checkpoint {path} is skipped:" in line for path, line in zip((newer, older), skipped, strict=True))
    assert said == (
        f"pretrain_coe.py: error: no checkpoint in {folder / 'checkpoints'} is complete, the most recent is "
        "step-00000012: the content of tensors/__0_0.distcp has changed: choose another output, or delete that folder "
        "to start from scratch"
    )
    assert json.loads((folder / "run.json").read_text())["attempts"][-1]["outcome"] == "finished"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("background", ["false", "true"])
def test_a_checkpoint_that_cannot_be_written_ends_a_run_in_one_line(
    background: str, config: Path, prepared: Path, tmp_path: Path
) -> None:
    """No file may be larger than 300 kB, as if the disk were full."""
    command = (
        sys.executable, "launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={tmp_path}",
        "parallel.expert=1", "training.steps=3", "training.save_every=2", f"training.background_saving={background}",
    )  # fmt: skip
    limited = f"ulimit -f 300; exec {shlex.join(map(str, command))}"
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 5 and "Traceback" not in done.stderr, done.stderr
    step = tmp_path / "checkpoints" / "step-00000002"
    assert f"checkpoint {step} could not be saved: " in done.stderr
    assert done.stderr.endswith("; the same command resumes from the most recent checkpoint\n")
    assert not step.exists() and "CheckpointNotSaved" in (tmp_path / "run.json").read_text()


@pytest.mark.slow
def test_profile_milestones_background_and_determinism_change_no_loss(
    config: Path, prepared: Path, finished: Path
) -> None:
    folder = prepared.parent / "watched"
    options = (
        "training.deterministic=true", "profile.first_step=2", "profile.steps=2", "profile.memory=true",
        "training.milestones=[1, 3]", "training.keep_checkpoints=1", "training.background_saving=true",
    )  # fmt: skip
    done = torchrun("launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={folder}", *options)
    assert done.returncode == 0, done.stderr
    assert f"profile of steps 2 to 3 in {folder / 'profile'}" in done.stderr
    expected, found = (read_metrics(path / "metrics.jsonl") for path in (finished, folder))
    for name in ("train_loss", "valid_loss", "grad_norm"):
        assert [line.get(name) for line in found] == [line.get(name) for line in expected]
    kept = [path.name for path in sorted((folder / "checkpoints").iterdir())]
    assert kept == ["step-00000001", "step-00000003", "step-00000012"]
    trace, table = sorted((folder / "profile").iterdir(), reverse=True)
    assert (trace.name, table.name) == ("trace-rank00000.json.gz", "operators-rank00000.txt")
    events = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"aten::mm", "[memory]", "step 2", "step 3", "layer 1, iteration 1", "layer 2, iteration 2"} <= events
    assert "aten::mm" in table.read_text()


@pytest.mark.slow
def test_a_warm_start_takes_weights_alone(config: Path, prepared: Path, finished: Path) -> None:
    folder = prepared.parent / "warm"
    common = ("launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={folder}")
    done = torchrun(*common, f"training.warm_start={finished}", "training.steps=1", "optimizer.lr=1e-9", *NO_DROPOUT)
    assert done.returncode == 0, done.stderr
    source = read_metrics(finished / "metrics.jsonl")[-1]
    assert f"starts from the weights of {finished / 'checkpoints' / 'step-00000012'}, after " in done.stderr
    begin, after = read_metrics(folder / "metrics.jsonl")
    assert begin["step"] == begin["tokens"] == 0 and begin["valid_loss"] == source["valid_loss"]
    assert after["valid_loss"] == pytest.approx(source["valid_loss"], rel=1e-5), "the master weights came along"
    assert after["learning_rate"] == 1e-9


@pytest.mark.slow
def test_a_branch_is_the_shorter_run(config: Path, prepared: Path, tmp_path: Path) -> None:
    common = ("launch/pretrain_coe.py", config, f"data.path={prepared}", "parallel.expert=1", "optimizer.decay=wsd")
    common += ("optimizer.warmup=0", "optimizer.cooldown=0.5", "training.log_every=1", "training.evaluate_every=2")
    trunk, branch, alone = (tmp_path / name for name in ("trunk", "branch", "alone"))
    source = f"training.branch_from={trunk}/checkpoints/step-00000002"
    for output, steps, *options in ((trunk, 6, "training.milestones=[2]"), (branch, 4, source), (alone, 4)):
        done = python(*common, f"output={output}", f"training.steps={steps}", *options)
        assert done.returncode == 0, done.stderr
    found, expected = (read_metrics(folder / "metrics.jsonl") for folder in (branch, alone))
    assert [line["step"] for line in found] == [3, 4]
    for name in ("train_loss", "valid_loss", "grad_norm", "learning_rate", "tokens"):
        assert [line.get(name) for line in found] == [line.get(name) for line in expected[-2:]], name
    done = python(*common, f"output={tmp_path / 'other'}", "training.steps=4", source, "optimizer.lr=1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "training.branch_from is " in done.stderr and "optimizer.lr is 1.0" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("model.num_layers=1",), "is of another model: decoder.layers.mlp"),
        (("training.warm_start=configs",), "training.warm_start is configs: configs holds no checkpoint"),
        (("training.warm_start=nowhere",), "training.warm_start is nowhere: there is no such folder"),
        (("training.warm_start={here}/step-00000001",), "is not complete: complete.json is missing"),
        (("data.path={other}",), "data.path has another tokenizer than training.warm_start"),
    ],
)
def test_a_warm_start_that_does_not_fit_is_one_line(
    options: tuple[str, ...], said: str, config: Path, prepared: Path, other_data: Path, finished: Path, tmp_path: Path
) -> None:
    output = f"output={tmp_path / 'run'}"
    common = ("launch/pretrain_coe.py", config, f"data.path={prepared}", output, "parallel.expert=1")
    (tmp_path / "step-00000001").mkdir()
    filled = [option.format(here=tmp_path, other=other_data) for option in options]
    done = python(*common, f"training.warm_start={finished}", *filled)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and said in done.stderr, done.stderr


@pytest.mark.slow
def test_data_may_move_but_not_change(config: Path, prepared: Path, other_data: Path, finished: Path) -> None:
    moved = shutil.copytree(prepared, prepared.parent / "moved")
    done = torchrun("launch/pretrain_coe.py", config, f"data.path={moved}", f"output={finished}")
    assert done.returncode == 0, done.stderr
    done = torchrun("launch/pretrain_coe.py", config, f"data.path={other_data}", f"output={finished}")
    assert done.returncode != 0
    assert f"data.path has another tokenizer than the checkpoints in {finished}" in done.stderr


@pytest.mark.slow
def test_the_layout_does_not_change_the_training(config: Path, prepared: Path, tmp_path: Path) -> None:
    """One rank with micro-batches of 8 against two ranks, expert parallel, with 4: rows differ in their padding."""
    common = ("launch/pretrain_coe.py", config, f"data.path={prepared}", "training.steps=6", *NO_DROPOUT)
    one, two = tmp_path / "one", tmp_path / "two"
    done = python(*common, f"output={one}", "parallel.expert=1", "training.micro_batch=8")
    assert done.returncode == 0, done.stderr
    done = torchrun(*common, f"output={two}")
    assert done.returncode == 0, done.stderr
    lines = zip(read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl"), strict=True)
    for alone, shared in lines:
        assert alone["tokens"] == shared["tokens"]
        for name in {"train_loss", "valid_loss", "grad_norm"} & alone.keys():
            assert shared[name] == pytest.approx(alone[name], rel=2e-4), (alone["step"], name)


@pytest.mark.slow
def test_a_run_goes_on_with_tensor_context_and_pipeline_parallelism(
    config: Path, prepared: Path, tmp_path: Path
) -> None:
    """Begun by one process; losses, norms, validation and routing of all layers are those it would have had."""
    common = (
        "launch/pretrain_coe.py", config, f"data.path={prepared}", "training.save_every=3", "model.num_layers=4",
        *NO_DROPOUT,
    )  # fmt: skip
    alone, tensor, pipeline, context, interleaved = (
        tmp_path / name for name in ("alone", "tensor", "pipeline", "context", "interleaved")
    )
    done = python(*common, f"output={alone}", "parallel.expert=1", "training.steps=3", "optimizer.warmup=0")
    assert done.returncode == 0, done.stderr
    layouts = {
        tensor: (2, "parallel.tensor=2"),
        context: (2, "parallel.expert=2", "parallel.context=2"),
        pipeline: (4, "parallel.tensor=2", "parallel.pipeline=2"),
        interleaved: (2, "parallel.expert=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    }
    for folder, (ranks, *layout) in layouts.items():
        shutil.copytree(alone, folder)
        changes = ("training.steps=6", "optimizer.warmup=0", *layout)
        done = torchrun(*common, f"output={folder}", *changes, ranks=ranks)
        assert done.returncode == 0 and "resumed at step 3" in done.stderr, done.stderr
    done = python(*common, f"output={alone}", "parallel.expert=1", "training.steps=6", "optimizer.warmup=0")
    assert done.returncode == 0, done.stderr
    expected = read_metrics(alone / "metrics.jsonl")
    for folder in layouts:
        for found, truth in zip(read_metrics(folder / "metrics.jsonl"), expected, strict=True):
            assert found["tokens"] == truth["tokens"]
            for name in {"train_loss", "valid_loss", "grad_norm", "aux_loss", "routing_entropy"} & truth.keys():
                assert found[name] == pytest.approx(truth[name], rel=2e-4), (folder.name, truth["step"], name)
            places = [
                [(entry["layer"], entry["iteration"]) for entry in line.get("routing", [])] for line in (found, truth)
            ]
            assert places[0] == places[1]


@pytest.mark.slow
def test_a_warning_to_one_stage_of_a_pipeline_stops_all_at_one_step(
    config: Path, prepared: Path, tmp_path: Path
) -> None:
    changes = ("parallel.expert=1", "parallel.pipeline=2", "training.steps=5000", "training.save_every=5000")
    command = ("launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={tmp_path}", *changes)
    with start_torchrun(*command) as process:
        wait_for_step(tmp_path, 2, process)
        os.kill(max(children(process)), signal.SIGTERM)  # the last stage, which writes no metrics
        process.wait(timeout=120)
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 1
    assert '"outcome": "interrupted"' in (tmp_path / "run.json").read_text()


@pytest.mark.slow
def test_a_blend_with_named_sets_goes_on_with_another_number_of_ranks(
    config: Path, prepared: Path, same_tokenizer: Path, tmp_path: Path
) -> None:
    """Three steps on two ranks with EP 2, three more on one: but for rounding the run of six on two ranks."""
    blend = f"data.blend=[{{path: {prepared}, weight: 1}}, {{path: {same_tokenizer}, weight: 3}}]"
    common = (
        "launch/pretrain_coe.py", config, blend, f"data.validation={{near: {prepared}, far: {same_tokenizer}}}",
        "training.evaluate_every=3", "training.save_every=3", "optimizer.warmup=0", *NO_DROPOUT,
    )  # fmt: skip
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for folder, steps in ((whole, 6), (parted, 3)):
        done = torchrun(*common, f"output={folder}", f"training.steps={steps}")
        assert done.returncode == 0, done.stderr
    done = python(*common, f"output={parted}", "training.steps=6", "parallel.expert=1")
    assert done.returncode == 0 and "resumed at step 3" in done.stderr, done.stderr
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (whole, parted)]
    assert [line["step"] for line in lines[1]] == list(range(7))
    for expected, found in zip(*lines, strict=True):
        assert found["tokens"] == expected["tokens"]
        for name in {"train_loss", "valid_loss", "grad_norm", "aux_loss"} & expected.keys():
            assert found[name] == pytest.approx(expected[name], rel=2e-4), (expected["step"], name)
        assert found.get("valid", {}).keys() == ({"near", "far"} if expected["step"] % 3 == 0 else set())
    near, far = (lines[1][-1]["valid"][name]["loss"] for name in ("near", "far"))
    assert near != far and min(near, far) < lines[1][-1]["valid_loss"] < max(near, far)
    board = EventAccumulator(str(parted / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss/valid/far/loss")] == [0, 3, 6]
    assert board.Scalars("loss/valid/far/loss")[-1].value == pytest.approx(far)

    back = python(*common, f"output={parted}", "training.steps=5", "parallel.expert=1")
    assert back.returncode == 2
    assert back.stderr.endswith(
        f"training.steps is 5: the run in {parted} has done 6; set at least that many, or use another output\n"
    )
    other = python(*common, f"output={parted}", "parallel.expert=1", "data.blend.1.weight=2")
    assert other.returncode == 2
    assert "error: data.blend has another text (or order or weights) than the checkpoints in" in other.stderr


@pytest.mark.slow
def test_ctrl_c_stops_after_a_step_with_a_checkpoint_and_goes_on(config: Path, prepared: Path, tmp_path: Path) -> None:
    common = ("launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={tmp_path}", "parallel.expert=1")
    process = start_python(
        *common, "training.save_every=9999", "training.steps=2000", "training.background_saving=true"
    )
    try:
        wait_for_step(tmp_path, 3, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped after step" in said and "Traceback" not in said
    assert '"outcome": "interrupted"' in (tmp_path / "run.json").read_text()
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("step-"))
    done = python(*common, f"training.steps={stopped + 2}")
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {stopped}" in done.stderr


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_a_checkpoint(config: Path, prepared: Path, tmp_path: Path) -> None:
    """While one is written after every step in the background; what was written before stays."""
    common = ("launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={tmp_path}", "parallel.expert=1")
    process = start_python(
        *common, "training.save_every=1", "training.steps=2000", "training.background_saving=true"
    )  # fmt: skip
    try:
        wait_for_step(tmp_path, 3, process)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in said
    assert said.endswith("; the same command resumes from the most recent checkpoint\n")
    done = python("launch/checkpoint.py", "verify", tmp_path)
    assert done.returncode == 0 and ": complete\n" in done.stdout


@pytest.mark.slow
def test_global_aux_loss_and_expert_bias_resume_exactly(config: Path, prepared: Path, tmp_path: Path) -> None:
    settings = (
        "moe.load_balancing=global_aux_loss", "moe.aux_loss_coeff=0.1", "moe.score_function=sigmoid",
        "moe.expert_bias=true", "parallel.expert=1", "training.save_every=3", "optimizer.warmup=0",
    )  # fmt: skip
    common = ("launch/pretrain_coe.py", config, f"data.path={prepared}", *settings)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder, steps in ((whole, 6), (halves, 3), (halves, 6)):
        done = python(*common, f"output={folder}", f"training.steps={steps}")
        assert done.returncode == 0, done.stderr
    last = [read_metrics(folder / "metrics.jsonl")[-1] for folder in (whole, halves)]
    assert last[0]["step"] == last[1]["step"] == 6
    assert [line["train_loss"] for line in last] == [last[0]["train_loss"]] * 2
    assert [line["grad_norm"] for line in last] == [last[0]["grad_norm"]] * 2


CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if "studies" not in path.parts)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_be_costed_without_data(path: Path) -> None:
    done = python("launch/pretrain_coe.py", path, "--dry-run", "--json", "data.path=nowhere")
    assert done.returncode == 0, done.stderr
    cost = json.loads(done.stdout)
    assert 0 < cost["parameters"]["active"] <= cost["parameters"]["total"]  # equal where K is N
    assert cost["memory_bytes_per_rank"]["total"] > 0 and cost["flops_per_token"]["total"] > 0


@pytest.mark.slow
def test_a_run_that_diverges_ends_and_says_so(config: Path, prepared: Path, tmp_path: Path) -> None:
    common = ("launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={tmp_path}", "parallel.expert=1")
    done = python(*common, "optimizer.lr=1e30", "training.log_every=99", "training.evaluate_every=99")
    assert done.returncode == 4
    assert "try a lower optimizer.lr" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert '"outcome": "failed' in (tmp_path / "run.json").read_text()


BROKEN = """
import runpy, sys
from coe_megatron.training import loop

def broken(*_: object) -> None:
    raise ValueError("a bug of a library")

loop.build_model = broken
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_bug_is_no_mistake_of_the_users(config: Path, prepared: Path, tmp_path: Path) -> None:
    """Also where it raises a ValueError: it keeps its traceback, and the attempt its record."""
    common = (config, f"data.path={prepared}", f"output={tmp_path}", "parallel.expert=1")
    done = python("-c", BROKEN, "launch/pretrain_coe.py", *common)
    assert done.returncode == 1, done.stderr
    assert "Traceback" in done.stderr and done.stderr.endswith("ValueError: a bug of a library\n"), done.stderr
    (attempt,) = json.loads((tmp_path / "run.json").read_text())["attempts"]
    assert attempt["outcome"] == "failed: ValueError('a bug of a library')"


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} launch/pretrain_coe.py configs/quickstart.yaml data.path=nowhere --dry-run | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), ("launch/one_host.py", "--", "--nproc-per-node", 2)], ids=["one", "two"])
def test_data_damaged_under_a_run_is_one_line_and_costs_nothing(
    launcher: tuple, config: Path, prepared: Path, tmp_path: Path
) -> None:
    data, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(prepared, data)
    common = ("launch/pretrain_coe.py", config, f"data.path={data}", f"output={output}", "parallel.expert=1")
    process = start_python(*launcher, *common, "training.save_every=1", "training.steps=2000")
    try:
        wait_for_step(output, 3, process)
        with (data / "train.bin").open("r+b") as file:
            file.write(b"\xff" * (data / "train.bin").stat().st_size)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2 and (launcher or "Traceback" not in said)  # torchrun ends in one of its own
    whose = "rank [01]: " if launcher else ""  # whoever draws it first
    where = re.escape(f"{data / 'train.bin'} is damaged: it contains token 65535, but the tokenizer has 512")
    assert re.search(f"^pretrain_coe.py: error: {whose}{where}", said, re.MULTILINE), said
    assert '"outcome": "failed: ' in (output / "run.json").read_text()
    shutil.copyfile(prepared / "train.bin", data / "train.bin")
    reached = max(int(path.name[5:]) for path in (output / "checkpoints").glob("step-*") if not path.suffix)
    done = python(*common, f"training.steps={reached + 1}")
    assert done.returncode == 0 and f"resumed at step {reached}" in done.stderr, done.stderr


@pytest.mark.parametrize("iterations", [1, 3])
def test_one_process_without_torchrun(config: Path, prepared: Path, tmp_path: Path, iterations: int) -> None:
    done = python(
        "launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={tmp_path}", "parallel.expert=1",
        "training.steps=3", f"chain.iterations={iterations}", "training.precision=bf16", "data.samples=packed",
        "data.reset_at_documents=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.alone
def test_gsm8k_is_learned_far_below_its_token_frequencies(real_text: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "gsm8k", tmp_path / "run"
    done = python(
        "launch/prepare_data.py", "--input", real_text / "gsm8k_train.jsonl", "--valid",
        real_text / "gsm8k_valid.jsonl", "--template", "query : {question} response : {answer}",
        "--vocab-size", 2048, "--output", data,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    command = ("launch/pretrain_coe.py", "configs/gsm8k.yaml", f"data.path={data}", f"output={run}")
    done = torchrun(*command, seconds=1100)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(run / "metrics.jsonl")
    entropy = json.loads((run / "run.json").read_text())["unigram_entropy"]
    assert lines[-1]["step"] >= 300
    assert lines[-1]["valid_loss"] <= entropy - 1.5
