"""launch/checkpoint.py upcycle: from a run of two ranks to a run of two ranks."""

from pathlib import Path

import pytest
from programs import python, torchrun

from coe_megatron.run.metrics_log import read_metrics

pytestmark = [pytest.mark.run, pytest.mark.timeout(600)]
PROGRAM = "launch/checkpoint.py"


def test_a_run_goes_on_as_a_chain(config: Path, prepared: Path, tmp_path: Path) -> None:
    """With expert parallelism; its first evaluation is the last one of the mixture of experts, to the last bit."""
    moe, chain, run = tmp_path / "moe", tmp_path / "chain", tmp_path / "run"
    short = ("training.steps=2", "training.save_every=2", "training.log_every=1")
    done = torchrun(
        "launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={moe}", "chain.iterations=1", *short
    )
    assert done.returncode == 0, done.stderr

    done = python(
        PROGRAM, "upcycle", moe, chain, "--iterations", 2, "--routers", "roll", "--set", "chain.residual=init"
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    written, said, train, settings = done.stdout.splitlines()
    assert (written, said) == (f"written: {chain}", "its first step computes what the model did")
    assert train == f"train it: launch/pretrain_coe.py {chain}/chain.yaml output=RUN"
    overrides = ["chain.iterations=2", "chain.residual=init", "chain.learned_scale=1.0", f"training.warm_start={chain}"]
    assert settings == f"or with the model's config and: {' '.join(overrides)}"

    done = torchrun("launch/pretrain_coe.py", chain / "chain.yaml", f"output={run}")
    assert done.returncode == 0, done.stderr
    start, first, _ = read_metrics(run / "metrics.jsonl")
    assert start["step"] == 0 and start["valid_loss"] == read_metrics(moe / "metrics.jsonl")[-1]["valid_loss"]
    assert first["train_loss"] < start["valid_loss"] + 1

    again = python(PROGRAM, "upcycle", moe, chain, "--iterations", 2, "--set", "moe.topk=1", "--overwrite")
    assert "moe.topk was 2 and is 1: its first step does not compute what the model did" in again.stdout, again.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--iterations", 0), "--iterations is 0: it must be at least 1"),
        (("--iterations", 1), "--iterations is 1: the model has 1 already, so it must be at least 2"),
        (("--iterations", 2, "--routers", "spin"), "--routers is spin: it must be one of copy, roll, fresh"),
        (
            ("--iterations", 2, "--routers", "roll", "--set", "chain.gating=fixed"),
            "--routers is roll: chain.gating fixed has no later routers, leave it away",
        ),
        (("--iterations", 2, "--seed", -1), "--seed is -1: it must be at least 0"),
        (("--iterations", 2, "--config", "nowhere.yaml"), "the config file is nowhere.yaml: there is no such file"),
        (("--iterations", 2, "--set", "moe.topk=9"), "moe.topk is 9: it must be at most moe.num_experts (8)"),
    ],
)
def test_a_mistake_is_one_line(options: tuple[object, ...], said: str, config: Path, tmp_path: Path) -> None:
    """Before anything is read of the checkpoint, of which there is none here."""
    (tmp_path / "config.yaml").write_text(config.read_text() + "chain: {iterations: 1}\n")
    done = python(PROGRAM, "upcycle", tmp_path, tmp_path / "out", *options)
    assert (done.returncode, done.stderr) == (2, f"checkpoint.py: error: {said}\n")


def test_a_checkpoint_without_a_config_needs_one(tmp_path: Path) -> None:
    done = python(PROGRAM, "upcycle", tmp_path, tmp_path / "out", "--iterations", 2)
    assert done.returncode == 2 and "it is not in a run's folder, so name the config" in done.stderr, done.stderr
