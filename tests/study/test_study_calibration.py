"""Hours from a finished run's own files: as many times longer than predicted as its own."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from coe_megatron.config import RunConfig, dump
from coe_megatron.config.settings import DataSettings, ModelSettings, TrainingSettings
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.machine import machine
from coe_megatron.study.plan.amounts import Amounts, RunTotals, Speed
from coe_megatron.study.plan.calibration import calibrate

CPU = machine("cpu")
CONFIG = RunConfig(
    model=ModelSettings(vocab_size=64),
    data=DataSettings(path="nowhere", validation_samples=40),
    training=TrainingSettings(steps=50, log_every=10, evaluate_every=20, save_every=20, milestones=[5]),
)
STARTUP, A_STEP, A_SAVE, RANKS = 7.0, 2.0, 3.0, 2
Write = Callable[..., Path]


def on_its_ranks(config: RunConfig, speed: Speed | None = None) -> RunTotals:
    return Amounts(speed or Speed(CPU)).run(config, RANKS)


PREDICTED = on_its_ranks(CONFIG)
A_PASS = PREDICTED.seconds.evaluations / 4 * A_STEP / PREDICTED.step.total  # of four evaluations


@pytest.fixture
def run(tmp_path: Path) -> Write:
    """Writes the folder of a run with the times above; the steps until the first logged one take ten times as long."""

    def write(outcome: str = "finished", attempts: int = 1, until: int = 50) -> Path:
        lines: list[dict[str, Any]] = [{"step": 0, "valid_loss": 4.0}]
        clock = A_PASS
        for step in range(1, until + 1):
            clock += A_STEP * (10 if step <= 10 else 1)
            if step % 10 == 0:
                left = clock / step * (50 - step)
                a_step = A_STEP * (10 if step == 10 else 1)
                lines.append({"step": step, "step_seconds": a_step, "eta_seconds": left})
                if step % 20 == 0 or step == 50:
                    lines[-1]["valid_loss"] = 3.0
                    clock += A_PASS
            clock += A_SAVE * (step % 20 == 0 or step in (5, 50))
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / "config.yaml").write_text(dump(CONFIG))
        began = datetime(2026, 11, 22, tzinfo=UTC)
        attempt = {"outcome": outcome, "began": began.isoformat()}
        attempt["ended"] = (began + timedelta(seconds=STARTUP + clock)).isoformat()
        rows = 64 * CONFIG.model.hidden_size
        record = {"attempts": [attempt] * attempts, "ranks": RANKS, "parameters": {"embedding": rows}}
        (tmp_path / "run.json").write_text(json.dumps(record))
        return tmp_path

    return write


def test_the_run_itself_is_predicted(run: Write) -> None:
    totals = on_its_ranks(CONFIG, calibrate(run(), CPU))
    seconds = totals.seconds
    assert seconds.steps == pytest.approx(50 * A_STEP)
    assert seconds.evaluations == pytest.approx(4 * A_PASS)
    assert seconds.checkpoints == pytest.approx(totals.checkpoints * A_SAVE) and totals.checkpoints == 4
    assert seconds.startup == pytest.approx(STARTUP)
    assert seconds.total == pytest.approx(STARTUP + 50 * A_STEP + 4 * A_PASS + 4 * A_SAVE)


def test_another_run_takes_longer_as_predicted(run: Write) -> None:
    speed = calibrate(run(), CPU)
    larger = replace(CONFIG, model=replace(CONFIG.model, num_layers=8), training=replace(CONFIG.training, steps=500))
    one, other = (on_its_ranks(config, speed) for config in (CONFIG, larger))
    ratio = other.step.total / one.step.total
    assert 1.5 < ratio < 2
    assert other.seconds.steps == pytest.approx(10 * ratio * one.seconds.steps)
    assert other.seconds.startup == one.seconds.startup


@pytest.mark.parametrize("how", [{"attempts": 2}, {"outcome": "interrupted", "until": 40}])
def test_of_a_run_in_several_attempts_only_steps_are_told(run: Write, how: dict[str, Any]) -> None:
    speed = calibrate(run(**how), CPU)
    assert (speed.startup, speed.saving) == (None, None)
    seconds = on_its_ranks(CONFIG, speed).seconds
    assert seconds.steps == pytest.approx(50 * A_STEP)
    assert (seconds.startup, seconds.checkpoints) == (PREDICTED.seconds.startup, PREDICTED.seconds.checkpoints)


def test_what_is_no_calibration_is_one_line(run: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.jsonl has 2 logged steps; 3 are needed"):
        calibrate(run(until=20), CPU)
    with pytest.raises(ConfigError, match=r"--calibration is .*none: there is no such folder"):
        calibrate(tmp_path / "none", CPU)
    (tmp_path / "run.json").write_text('{"attempts": [{"outcome": "running"}]}')
    with pytest.raises(ConfigError, match=r"its run\.json has no attempt with a step"):
        calibrate(tmp_path, CPU)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ranks": "two"}, "its run.json is damaged (ranks: "),
        ({"attempts": [3]}, "its run.json is damaged (attempts.0: "),
        ({"attempts": [{"outcome": "finished", "began": "x", "ended": "x"}]}, "attempts.0.began: "),
        ({"parameters": {"embedding": -1}}, "its run.json is damaged (parameters.embedding: "),
    ],
)
def test_a_damaged_record_is_one_line(run: Write, changes: dict[str, Any], said: str) -> None:
    record = run() / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))
    with pytest.raises(ConfigError) as error:
        calibrate(record.parent, CPU)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step_seconds": 1e308}, "step 30: step_seconds: Input should be less than 1000000000000"),
        ({"step_seconds": -1.0}, "step 30: step_seconds: Input should be greater than or equal to 0"),
        ({"eta_seconds": 1e308}, "step 30: eta_seconds: Input should be less than 1000000000000"),
        ({"eta_seconds": 1e17}, "step 30: eta_seconds: Input should be less than 1000000000000"),
        ({"step": 7}, "step 7 follows step 20"),
    ],
)
def test_times_that_no_run_takes_are_one_line(run: Write, changes: dict[str, Any], said: str) -> None:
    """Of one line of several: a median alone would not show it."""
    folder = change_metrics(run(), 30, changes)
    with pytest.raises(ConfigError) as error:
        calibrate(folder, CPU)
    assert str(error.value) == f"--calibration is {folder}: its metrics.jsonl is damaged ({said})"


@pytest.mark.parametrize("seconds", [1e-300, 1e-30, 9e11])
def test_steps_that_no_device_takes_are_one_line(run: Write, seconds: float) -> None:
    folder = run()
    for step in (10, 20, 30, 40, 50):
        change_metrics(folder, step, {"step_seconds": seconds})
    with pytest.raises(ConfigError) as error:
        calibrate(folder, CPU)
    said = f"its metrics.jsonl is damaged ({seconds:.3g} s per step on {RANKS} ranks would be "
    assert said in str(error.value) and str(error.value).endswith(" FLOP/s per rank)")


def test_times_that_were_not_finite_are_left_out(run: Write) -> None:
    folder = change_metrics(run(), 30, {"step_seconds": None, "eta_seconds": None})
    assert calibrate(folder, CPU).factor == calibrate(run(), CPU).factor


def change_metrics(folder: Path, step: int, changes: dict[str, Any]) -> Path:
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | (changes if line["step"] == step else {})) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("run.json", b"[" * 10**5, "it must be the folder of a run (it is nested too deep)"),
        ("run.json", b"\xff", "it must be the folder of a run"),
        ("metrics.jsonl", b'{"step": 1, "step_seconds": "x"}\n', "metrics.jsonl, line 1: step_seconds: "),
        ("metrics.jsonl", b"{\n", "it must be the folder of a run"),
        ("metrics.jsonl", None, "there is no such file"),
        ("config.yaml", None, "there is no such file"),
    ],
)
def test_a_damaged_file_is_one_line(run: Write, file: str, content: bytes | None, said: str) -> None:
    path = run() / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        calibrate(path.parent, CPU)
    assert said in str(error.value)
