"""Tuning: every arm gets the value that is best for it on seeds of its own, decided by the runs' folders alone."""

import csv
import io
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_made_up import leave

from coe_megatron.errors import ConfigError
from coe_megatron.study.plan.arms import Run, make_study
from coe_megatron.study.plan.cost_table import Plan, make_plan
from coe_megatron.study.plan.study_file import read_study
from coe_megatron.study.plan.tuning import TuningCurve
from coe_megatron.study.report.report import write_report
from coe_megatron.study.report.tuning import tuning_csv, tuning_table, tuning_text
from coe_megatron.study.run import runner

Write = Callable[..., Path]
Program = Callable[..., tuple[int, str, str]]
STAND_IN = Path(__file__).with_name("study_stand_in.py")
TUNE = {"setting": "optimizer.lr", "values": [1e-3, 2e-3, 4e-3], "seeds": [101, 102]}
MOE, COE, NORM = "moe-4-8_prenorm", "coe-2-2-8_prenorm", "coe-2-2-8_iteration-norm"
# Loss by arm and learning rate: the MoE is best in the middle, the chains at the edges of the grid.
LOSSES = {MOE: [3.2, 3.0, 3.1], COE: [2.8, 2.9, 3.3], NORM: [3.1, 3.0, 2.7]}
CHOSEN = {MOE: 2e-3, COE: 1e-3, NORM: 4e-3}


def loss(run: Run) -> float:
    return LOSSES[run.arm][TUNE["values"].index(run.config.optimizer.lr)] + (0.01 if run.seed == 102 else 0.0)


@pytest.fixture
def file(study_file: Write, tmp_path: Path) -> Path:
    return study_file(output=str(tmp_path / "out"), tune=TUNE)


def tuned(file: Path) -> Plan:
    plan = make_plan(file)
    for run in plan.tuning_runs:
        leave(run, loss(run))
    return make_plan(file)


def test_before_tuning_no_run_of_the_comparison_is_ready(file: Path) -> None:
    plan = make_plan(file, machine="cpu")
    assert len(plan.tuning_runs) == 3 * 3 * 2 and len(plan.study.runs) == 6 and plan.ready_runs == []
    first = plan.tuning_runs[0]
    assert first.config.output.endswith(f"out/{MOE}/tune/optimizer.lr-0.001/seed-101")
    assert (first.config.training.seed, first.config.optimizer.lr) == (101, 1e-3)
    assert first.title == f"{MOE}, optimizer.lr 0.001, seed 101"
    assert len({run.config.output for run in (*plan.tuning_runs, *plan.study.runs)}) == 24
    table = plan.table()
    assert "6 runs: 3 arms, 2 seeds each, after 18 to tune optimizer.lr; " in table
    assert f"{MOE}: optimizer.lr is not chosen yet: 6 of 6 tuning runs have no loss" in table
    alone = make_plan(file, ["training.steps=100"], machine="cpu")
    assert plan.device_seconds == alone.device_seconds == pytest.approx(4 * (alone.tuning_seconds or 0) / 3)


def test_every_arm_runs_with_the_value_that_was_best_for_it(file: Path) -> None:
    plan = tuned(file)
    assert {arm.name: arm.config.optimizer.lr for arm in plan.study.arms} == CHOSEN
    assert {run.arm: run.config.optimizer.lr for run in plan.ready_runs} == CHOSEN and len(plan.ready_runs) == 6
    assert all("optimizer.lr=" in " ".join(run.overrides) for run in plan.ready_runs)
    assert {curve.arm: curve.at_edge for curve in plan.tuning} == {MOE: False, COE: True, NORM: True}
    assert plan.tuning[0].means == pytest.approx([3.205, 3.005, 3.105])
    assert f"{COE}: optimizer.lr 0.001 is chosen, loss 2.8050, at the edge of the grid" in plan.table()


def test_tuning_runs_can_have_settings_of_their_own(study_file: Write, tmp_path: Path) -> None:
    shorter = TUNE | {"set": {"training.steps": 20, "training.evaluate_every": 10}}
    file = study_file(output=str(tmp_path / "out"), tune=shorter, set={"training.steps": 50})
    plan = tuned(file)
    assert {run.config.training.steps for run in plan.tuning_runs} == {20}
    assert {run.config.training.steps for run in plan.study.runs} == {50}
    assert {arm.name: arm.config.optimizer.lr for arm in plan.study.arms} == CHOSEN
    assert " Tuning runs have training.steps 20, training.evaluate_every 10. " in tuning_text(plan.tuning)
    plan = make_plan(file, machine="cpu")
    short = plan.tuning_seconds
    long = make_plan(study_file(tune=TUNE, set={"training.steps": 50}), machine="cpu").tuning_seconds
    assert short is not None and long is not None
    a_step = min(arm.seconds.steps / 50 for arm in plan.arms if arm.seconds)
    assert long - short > 0.9 * len(plan.tuning_runs) * 30 * a_step


def test_an_arm_whose_runs_are_not_complete_waits_alone(file: Path) -> None:
    run = next(each for each in tuned(file).tuning_runs if each.arm == COE)
    shutil.rmtree(run.config.output)
    plan = make_plan(file)
    assert {each.arm for each in plan.ready_runs} == {MOE, NORM}
    assert next(curve for curve in plan.tuning if curve.arm == COE).missing == [run]


def test_a_run_with_other_settings_does_not_count(file: Path) -> None:
    tuned(file)
    assert make_plan(file, ["training.steps=200"]).ready_runs == []


def test_a_run_that_diverged_counts_as_an_infinite_loss(file: Path) -> None:
    diverged = [run for run in tuned(file).tuning_runs if run.arm == MOE and run.config.optimizer.lr > 1e-3]
    for run in diverged[1:]:
        leave(run, outcome="failed: Diverged('steps 3 to 7 were skipped')")
    curve = make_plan(file).tuning[0]
    assert curve.means[1:] == [math.inf, math.inf] and curve.chosen == 1e-3 and curve.missing == []
    for run in make_plan(file).tuning_runs:
        leave(run, outcome="failed: Diverged('steps 3 to 7 were skipped')")
    plan = make_plan(file)
    assert plan.ready_runs == [] and plan.tuning[0].outcome.endswith("every value of the grid diverged")
    leave(diverged[0], outcome="failed: OSError('disk')")
    assert make_plan(file).tuning[0].missing == [diverged[0]]


@given(st.lists(st.lists(st.sampled_from([2.0, 2.5, 3.0, math.inf]), min_size=2, max_size=2), min_size=2, max_size=5))
def test_the_choice_is_the_first_of_the_lowest_means(losses: list[list[float]]) -> None:
    values = [10.0**index for index in range(len(losses))]
    runs: Any = [["a run", "a run"] for _ in values]
    curve = TuningCurve("arm", "Arm", "optimizer.lr", values, runs, [dict(enumerate(each)) for each in losses])
    means = [sum(each) / 2 for each in losses]
    if min(means) == math.inf:
        assert curve.chosen is None and not curve.at_edge
        return
    assert curve.chosen == min(values, key=lambda value: (means[values.index(value)], value))
    assert curve.at_edge == (curve.chosen in (values[0], values[-1]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": [2, 101]}, "tune.seeds has 2, which is one of seeds: "),
        ({"seeds": [101, 101]}, "tune.seeds is [101, 101]: seeds must differ"),
        ({"values": [1e-3]}, "tune.values is [0.001]: "),
        ({"values": [1e-3, 1e-3]}, "tune.values is [0.001, 0.001]: values must differ"),
        ({"values": [2e-3, 1e-3]}, "tune.values is [0.002, 0.001]: numbers must be in increasing order"),
        ({"values": [1e-3, -1]}, "numbers must be in increasing order"),
        ({"values": [-1, 1e-3]}, f"arm {MOE}: optimizer.lr is -1"),
        ({"setting": "optimizer.rate"}, f"arm {MOE}: optimizer.rate is not a setting"),
        ({"setting": "moe.topk"}, "tune.setting is moe.topk: axes.design sets it already"),
        ({"setting": "training.seed"}, "tune.setting is training.seed: seeds sets it already"),
        ({"setting": "training.steps"}, "tune.setting is training.steps: the setting of all arms sets it already"),
        ({"setting": "model.hidden_size", "values": [32, 64]}, f"with 64, {MOE} has another flops than the budget"),
        ({"set": {"moe.topk": 3}}, "tune.set sets moe.topk: axes.design sets it already"),
        ({"set": {"optimizer.lr": 1e-3}}, "tune.set sets optimizer.lr: tune.setting sets it already"),
        ({"set": {"training.seed": 2}}, "tune.set sets training.seed: seeds sets it already"),
        ({"set": {"training.stepps": 2}}, f"arm {MOE}: training.stepps is not a setting"),
        ({"sedes": [1]}, "tune.sedes is not a setting; did you mean tune.seeds"),
    ],
)
def test_a_mistake_is_one_line(study_file: Write, changes: dict[str, Any], said: str) -> None:
    budget = {"equal": "flops", "solve": "training.global_batch", "range": [2, 8], "multiple_of": 2, "tolerance": 0.9}
    file = study_file(tune=TUNE | changes, set={"training.steps": 50}, budget=budget)
    with pytest.raises(ConfigError) as error:
        make_plan(file)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_report_has_the_curves_and_warns_of_edges(file: Path, tmp_path: Path) -> None:
    plan = tuned(file)
    columns, rows = tuning_table(plan.tuning)
    assert columns == ["arm", "0.001", "0.002", "0.004", "chosen"]
    assert rows[0] == ["MoE(4/8) prenorm", "3.2050", "3.0050", "3.1050", "0.002"]
    assert rows[1][-1] == "0.001 (edge of the grid)"
    assert tuning_text(plan.tuning).count("(0.001)") == 1 and "over the seeds 101, 102, " in tuning_text(plan.tuning)
    lines = list(csv.DictReader(io.StringIO(tuning_csv(plan.tuning))))
    assert len(lines) == 18 and sum(int(line["chosen"]) for line in lines) == 3 * 2
    assert float(lines[3]["valid_loss"]) == pytest.approx(3.01)
    files = write_report(plan, "A study", tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert tmp_path / "report/tuning.csv" in files and "## Tuning" in text and "At the edge of the grid" in text


class Machine:
    """Runs of the study made by the stand-in; `how` overrides what a run does, by its title."""

    def __init__(self, file: Path, patch: pytest.MonkeyPatch) -> None:
        self.file, self.how, self.started = file, dict[str, str](), list[str]()
        (file.parent / "out").mkdir()
        patch.setattr(runner, "_POLL_SECONDS", 0.01)
        patch.setattr(runner, "command", self._command)
        patch.setattr(runner, "without_gpu", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")

    def _command(self, run: Run, config: Path) -> list[str]:
        self.started.append(run.title)
        return [sys.executable, str(STAND_IN), str(config), self.how.get(run.title, f"loss {loss(run)}")]


@pytest.fixture
def machine(file: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(file, monkeypatch)


@pytest.mark.thorough
def test_run_tunes_first_and_then_compares(machine: Machine, study_program: Program) -> None:
    status, out, _ = study_program("run", machine.file, "--at-once", 6)
    assert status == 0 and "18 tuning runs are unfinished" in out and "6 of 6 runs are unfinished" in out
    assert len(machine.started) == 24 and all("optimizer.lr" in title for title in machine.started[:18])
    assert f"{MOE}: optimizer.lr 0.002 is chosen, loss 3.0050" in out and "24 of 24 runs are done" in out
    assert study_program("run", machine.file)[0] == 0 and len(machine.started) == 24
    status, out, _ = study_program("status", machine.file, "--json")
    assert out.count('"finished"') == 24


@pytest.mark.thorough
def test_an_arm_that_cannot_be_chosen_does_not_stop_the_others(machine: Machine, study_program: Program) -> None:
    machine.how = {f"{COE}, optimizer.lr 0.004, seed 101": "fail", f"{MOE}, optimizer.lr 0.004, seed 101": "diverged"}
    status, out, _ = study_program("run", machine.file, "--at-once", 6)
    assert status == 1 and f"{COE}: optimizer.lr is not chosen yet: 1 of 6 tuning runs have no loss" in out
    assert len(machine.started) == 18 + 4 and f"{COE}, seed 1" not in machine.started
    machine.how = {}
    assert study_program("run", machine.file, "--at-once", 6)[0] == 0
    assert machine.started[22:] == [f"{COE}, optimizer.lr 0.004, seed 101", f"{COE}, seed 1", f"{COE}, seed 2"]


@pytest.mark.thorough
def test_selections_keep_to_their_arm_and_seed(machine: Machine, study_program: Program) -> None:
    study_program("run", machine.file, "--only", COE, "--seed", 102, "--at-once", 6)
    assert len(machine.started) == 3 and all(title.endswith(", seed 102") for title in machine.started)
    study_program("run", machine.file, "--only", COE, "--seed", 1, "--at-once", 6)
    assert len(machine.started) == 6 + 1 and machine.started[-1] == f"{COE}, seed 1"
    assert (
        study_program("run", machine.file, "--seed", 7)[2]
        .strip()
        .endswith("--seed is 7: it must be one of 1, 2, 101, 102")
    )


@pytest.mark.thorough
def test_submit_has_the_tuning_first_and_the_rest_afterwards(file: Path, study_program: Program) -> None:
    status, out, _ = study_program("submit", file, "--dry-run")
    assert status == 0 and "--array=0-17" in out and "submit again when the tuning runs are done" in out
    tuned(file)
    status, out, _ = study_program("submit", file, "--dry-run")
    assert "--array=0-5" in out and "tune/" not in out and "submit again" not in out


def test_seeds_of_weights_and_data_can_differ(study_file: Write) -> None:
    settings = read_study(study_file(seeds={"weights": [1, 2, 3], "data": [7]}))
    runs = make_study(settings).arms[0].runs(settings.run_seeds)
    assert [(run.seed, run.config.training.seed, run.config.training.data_seed) for run in runs] == [
        (1, 1, 7), (2, 2, 7), (3, 3, 7),
    ]  # fmt: skip
    assert "training.data_seed=7" in runs[0].overrides and "same order" in settings.seed_effect
    settings = read_study(study_file(seeds={"weights": [1], "data": [7, 8]}))
    assert [(seed.name, seed.weights, seed.data) for seed in settings.run_seeds] == [(7, 1, 7), (8, 1, 8)]
    assert "same weights" in settings.seed_effect
    settings = read_study(study_file(seeds=[4, 5]))
    assert [(seed.weights, seed.data) for seed in settings.run_seeds] == [(4, None), (5, None)]


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ({"weights": [1, 2], "data": [1, 2, 3]}, "seeds has 2 weights and 3 data: use lists of one length"),
        ({"weights": [1, 1], "data": [1]}, "seeds is [1, 1]: seeds must differ"),
        ({"weights": [1, -2], "data": [1]}, "seeds.weights.1 is -2"),
        ({"weights": [1, 2]}, "seeds.data is missing"),
        ({"weights": [1, 2], "date": [1]}, "seeds.date is not a setting; did you mean data"),
        ([], "seeds is []"),
    ],
)
def test_mistaken_seeds_are_one_line(study_file: Write, seeds: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_study(study_file(seeds=seeds))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_seed_lists_have_no_key_of_their_own(study_file: Write) -> None:
    with pytest.raises(ConfigError, match="seeds_of is not a setting; did you mean seeds: "):
        read_study(study_file(seeds_of={"weights": [1], "data": [1]}))
