"""A whole study through its program: killed, stopped and gone on with, it comes to what an undisturbed one comes to."""

import csv
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import Program, kill, python

from coe_megatron.run.metrics_log import read_metrics

Write = Callable[..., Path]
pytestmark = [pytest.mark.run, pytest.mark.timeout(1200)]
DESIGNS = {
    "MoE(2/8)": {"chain.iterations": 1, "moe.topk": 2},
    "CoE-2(1/8)": {"chain.iterations": 2, "moe.topk": 1},
    "CoE-2(2/8)": {"chain.iterations": 2, "moe.topk": 2},
}


@pytest.fixture
def program(study_file: Write, tmp_path: Path) -> Callable[..., list[str]]:
    """The command of six arms, or three, in a folder of the name given; `run` is `study.py run STUDY`."""
    data = tmp_path / "data"
    done = python("launch/prepare_data.py", "--builtin", 200, "--vocab-size", 512, "--output", data)
    assert done.returncode == 0, done.stderr

    def command(output: str, norm_placements: tuple[str, ...] = ("prenorm", "reference")) -> list[str]:
        common = {
            "data.path": str(data), "model.vocab_size": None, "training.steps": 40, "training.evaluate_every": 20,
            "training.save_every": 10, "training.log_every": 1, "logging.tensorboard": False,
        }  # fmt: skip
        axes = {"design": DESIGNS, "norm_placement": {"chain.norm_placement": list(norm_placements)}}
        baseline = {"design": "MoE(2/8)", "norm_placement": "prenorm"}
        changes = {"axes": axes, "set": common, "skip": None, "baseline": baseline, "seeds": [1]}
        file = study_file(output=str(tmp_path / output), **changes)
        return [str(file.rename(tmp_path / f"{output}.yaml"))]

    return command


def run(study: list[str]) -> Program:
    return Program([sys.executable, "launch/study.py", "run", *study, "--at-once", "2"], start_new_session=True)


def wait_for_step(step: int, folder: Path, process: Program, but: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Until a run has logged a step, other than those of some arms; the arms that have begun."""
    deadline = time.monotonic() + 400
    while True:
        logged = {path.parents[1].name: read_metrics(path) for path in folder.glob("*/seed-1/metrics.jsonl")}
        if any(arm not in but and lines and lines[-1]["step"] >= step for arm, lines in logged.items()):
            return tuple(logged)
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_three_short_runs_and_their_report(program: Callable[..., list[str]], tmp_path: Path) -> None:
    study = [*program("short", ("prenorm",)), "training.steps=3", "training.evaluate_every=3"]
    for command in (("run", *study, "--at-once", "2"), ("report", *study)):
        done = python("launch/study.py", *command, seconds=500)
        assert done.returncode == 0, done.stderr
    logs = [read_metrics(path) for path in (tmp_path / "short").glob("*/seed-1/metrics.jsonl")]
    assert [[line["step"] for line in log] for log in logs] == [[0, 1, 2, 3]] * 3
    rows = csv.DictReader((tmp_path / "short" / "report" / "results.csv").open())
    assert [row["state"] for row in rows] == ["finished"] * 3


@pytest.mark.slow
@pytest.mark.alone
def test_killed_twice_a_study_gives_the_same_results(program: Callable[..., list[str]], tmp_path: Path) -> None:
    undisturbed, disturbed = program("undisturbed"), program("disturbed")
    with run(undisturbed) as process:
        assert process.wait(600) == 0
    with run(disturbed) as process:
        begun = wait_for_step(12, tmp_path / "disturbed", process)
        kill(process)
    with run(disturbed) as process:
        wait_for_step(2, tmp_path / "disturbed", process, but=begun)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 3
    with run(disturbed) as process:
        assert process.wait(600) == 0
    for study in (undisturbed, disturbed):
        done = python("launch/study.py", "report", *study)
        assert done.returncode == 0, done.stderr
    found, wanted = (tmp_path / output / "report" / "results.csv" for output in ("disturbed", "undisturbed"))
    assert found.read_bytes() == wanted.read_bytes()
    assert [row["state"] for row in csv.DictReader(found.open())] == ["finished"] * 6
    timings = list(csv.DictReader(found.with_name("timings.csv").open()))
    assert max(int(row["attempts"]) for row in timings) > 1
