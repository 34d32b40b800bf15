"""Ladders: the rule's sizes, branches of one run, and predictions that are registered before the largest width runs."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from study_made_up import leave

from coe_megatron.config import RunConfig
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.machine import machine
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.step_time import step_time
from coe_megatron.launcher.torchrun_supervisor import Requests
from coe_megatron.study.plan import registration
from coe_megatron.study.plan.arms import Run
from coe_megatron.study.plan.cost_table import Plan, make_plan
from coe_megatron.study.plan.ladder import sizes
from coe_megatron.study.plan.law import Law, Point, fit_law
from coe_megatron.study.plan.registration import read_registration, register
from coe_megatron.study.report.comparison import compare
from coe_megatron.study.report.figures.draw import draw
from coe_megatron.study.report.ladder import find
from coe_megatron.study.report.report import write_report
from coe_megatron.study.report.results import collect
from coe_megatron.study.run import runner
from coe_megatron.study.run.runner import Runner, has_trunk
from coe_megatron.training.lr_schedule import learning_rate

Write = Callable[..., Path]
Program = Callable[..., tuple[int, str, str]]
LADDER = {"widths": [16, 32, 64], "tokens_per_parameter": [1, 2, 4], "rate_exponent": 1.0}
DESIGNS = {
    "MoE(4/8)": {"chain.iterations": 1, "moe.topk": 4},
    "CoE-2(2/8)": {"chain.iterations": 2, "moe.topk": 2},
}
LAW = Law(E=1.5, A=30.0, alpha=0.35, B=40.0, beta=0.3, phi=0.4)


@pytest.fixture
def file(study_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the study of a ladder; keyword arguments are keys of `ladder`, or of the study as `study_KEY`."""

    monkeypatch.setattr(registration, "fit_law", partial(fit_law, replicates=20))

    def write(**changes: Any) -> Path:
        study = {key.removeprefix("study_"): changes.pop(key) for key in list(changes) if key.startswith("study_")}
        given = {
            "output": str(tmp_path / "out"),
            "axes": {"design": DESIGNS},
            "skip": None,
            "baseline": {"design": "MoE(4/8)"},
            "set": {"training.global_batch": 64, "training.evaluate_every": 20},
            "ladder": LADDER | changes,
        }
        return study_file(**(given | study))

    return write


def of(plan: Plan, design: str, width: int, tokens: float) -> RunConfig:
    labels = {"design": design, "width": str(width), "tokens per parameter": str(tokens)}
    return next(arm.config for arm in plan.study.arms if arm.labels == labels)


def loss(run: Run) -> float:
    shape = RunShape.of(run.config, 64).model
    training = run.config.training
    tokens = training.steps * training.global_batch * run.config.model.seq_length
    return LAW.loss(Point(*sizes(shape), run.config.chain.iterations, tokens)) * (1 + 0.0002 * (-1) ** run.seed)


def finish(plan: Plan, largest: bool) -> None:
    for run in plan.study.runs:
        if (run.config.model.hidden_size == 64) == largest:
            leave(run, loss(run))


def test_sizes_follow_the_rule(file: Callable[..., Path]) -> None:
    plan = make_plan(file(widths=[16, 32, 128], depth_exponent=1.0, batch_exponent=0.5))
    base = of(plan, "CoE-2(2/8)", 32, 4)  # the base's width
    assert (base.optimizer.lr, base.moe.ffn_hidden_size, base.model.num_layers) == (3e-4, 16, 2)
    large = of(plan, "CoE-2(2/8)", 128, 4)
    assert large.model.num_attention_heads == 8 and large.moe.ffn_hidden_size == 64 and large.model.num_layers == 8
    assert large.optimizer.lr == pytest.approx(3e-4 / 4)
    smallest = of(plan, "MoE(4/8)", 16, 4)
    assert smallest.training.global_batch == 64  # the base's
    grown = plan.study.rule.parameters(128) / plan.study.rule.parameters(16) if plan.study.rule else 0
    assert large.training.global_batch == pytest.approx(64 * grown**0.5, abs=1) and large.training.global_batch % 2 == 0


def test_tokens_are_a_multiple_of_the_parameters_for_every_design(file: Callable[..., Path]) -> None:
    plan = make_plan(file())
    assert plan.study.rule is not None
    for width in LADDER["widths"]:
        for tokens in LADDER["tokens_per_parameter"]:
            configs = [of(plan, design, width, tokens) for design in DESIGNS]
            seen = {each.training.steps * each.training.global_batch * each.model.seq_length for each in configs}
            assert len(seen) == 1
            step = configs[0].training.global_batch * configs[0].model.seq_length
            assert abs(seen.pop() - tokens * plan.study.rule.parameters(width)) <= step / 2


def test_n1_and_n2_are_what_a_token_uses(file: Callable[..., Path]) -> None:
    for arm in make_plan(file()).arms:
        shape = RunShape.of(arm.arm.config, 64).model
        outside, inside = sizes(shape)
        chain, expert = arm.arm.config.chain.iterations, 3 * shape.hidden * shape.expert_ffn
        per_layer = shape.topk * expert + 3 * shape.hidden * shape.shared_ffn + shape.experts * shape.hidden
        assert inside == shape.layers * per_layer
        # in all iterations together no more than all parameters without embeddings, of which experts may be reused
        embeddings = 2 * shape.vocab * shape.hidden + shape.hidden
        idle = shape.layers * (shape.experts - chain * shape.topk) * expert
        repeated = (chain - 1) * shape.layers * 3 * shape.hidden * shape.shared_ffn
        assert outside + chain * inside - repeated == arm.parameters - embeddings - idle


def test_shorter_runs_branch_off_the_longest_before_they_decay(file: Callable[..., Path]) -> None:
    plan = make_plan(file(), machine="cpu")
    for width in LADDER["widths"]:
        trunk, *branches = (of(plan, "MoE(4/8)", width, tokens) for tokens in (4, 1, 2))
        steps = []
        for branch in branches:
            assert branch.training.branch_from is not None
            assert branch.training.branch_from.startswith(f"{trunk.output}/seed-{{seed}}/checkpoints/step-")
            step = int(branch.training.branch_from[-8:])
            steps.append(step)
            rates = [learning_rate(each.optimizer, step - 1, each.training.steps) for each in (branch, trunk)]
            assert rates[0] == rates[1] == branch.optimizer.lr
            assert learning_rate(branch.optimizer, step + 1, branch.training.steps) < branch.optimizer.lr
        assert trunk.training.milestones == steps and trunk.training.branch_from is None
    first = next(run for run in plan.study.runs if run.config.training.branch_from)
    assert f"/seed-{first.seed}/checkpoints/" in str(first.config.training.branch_from)
    arm = next(arm for arm in plan.arms if arm.arm.config.training.branch_from)
    step = step_time(RunShape.of(arm.arm.config, 64), machine("cpu")).total
    assert arm.seconds and arm.seconds.steps < 0.3 * step * arm.arm.config.training.steps  # only the decay is run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"widths": [64]}, "ladder.widths is [64]: it should have at least 2 items"),
        ({"widths": [64, 32]}, "ladder.widths is [64, 32]: numbers must be in increasing order"),
        ({"widths": [32, 32]}, "ladder.widths is [32, 32]: widths must differ"),
        ({"widths": [31, 33]}, "ladder.widths has 31: shape.heads is 2: it must be a divisor of hidden, 31"),
        ({"tokens_per_parameter": [0.1, 8]}, "ladder.tokens_per_parameter has 0.1: at width 16 its decay begins after"),
        ({"tokens_per_parameter": []}, "ladder.tokens_per_parameter is []"),
        ({"rate_exponent": None}, "ladder.rate_exponent is null"),
        ({"rate_exponent": -1}, "ladder.rate_exponent is -1"),
        ({"rates": [1]}, "ladder.rates is not a setting"),
        (
            {"study_axes": {"design": DESIGNS, "width": {"a": {}, "b": {"moe.scaling": 2}}}},
            "axes.width is an axis of the",
        ),
        (
            {"study_axes": {"design": {"MoE(4/8)": {"optimizer.lr": 1}}}},
            "axes.design sets optimizer.lr: ladder sets it",
        ),
    ],
)
def test_a_mistake_is_one_line(file: Callable[..., Path], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_plan(file(**changes))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_rate_factors_are_an_axis_that_tests_the_rule(file: Callable[..., Path]) -> None:
    plan = make_plan(file(tokens_per_parameter=[2], rate_factors=[0.5, 1, 2], widths=[16, 32]))
    rates = {(arm.labels["width"], arm.labels["rate factor"]): arm.config.optimizer.lr for arm in plan.study.arms}
    assert rates == {
        (width, factor): pytest.approx(3e-4 * float(factor) * 32 / int(width))
        for width in ("16", "32")
        for factor in ("0.5", "1", "2")
    }
    assert {arm.config.optimizer.decay for arm in plan.study.arms} == {"constant"}  # the base's: nothing branches
    with pytest.raises(ConfigError, match=r"ladder\.rate_factors is "):
        register(plan.study)


def test_a_branch_waits_for_its_trunk(file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.01)
    plan = make_plan(file(widths=[16, 32], tokens_per_parameter=[1, 4]))
    branch, trunk = (run for run in plan.study.runs[:4] if run.seed == 1)
    source = Path(str(branch.config.training.branch_from))
    assert source.is_relative_to(trunk.config.output) and not has_trunk(branch) and has_trunk(trunk)
    ended = Runner([], 1, lambda _line: None).run([branch], Requests())
    assert [each.reason for each in ended] == [f"training.branch_from is {source}: it does not exist"]
    started: list[str] = []

    def launch(_self: Runner, run: Run, _devices: list[str]) -> Any:
        started.append(run.title)
        source.mkdir(parents=True, exist_ok=True)
        raise ConfigError("that is enough")

    monkeypatch.setattr(Runner, "_launch", launch)
    Runner([], 1, lambda _line: None).run([branch, trunk], Requests())
    assert started == [trunk.title, branch.title]


def test_submit_leaves_branches_for_later(file: Callable[..., Path], study_program: Program) -> None:
    path = file(widths=[16, 32], tokens_per_parameter=[1, 4])
    status, out, _ = study_program("submit", path, "--dry-run")
    assert status == 0 and "--array=0-7" in out and "8 runs are branches: submit again" in out
    status, out, _ = study_program("submit", path, "--dry-run", "--before-largest")
    assert status == 0 and "--array=0-3" in out and "_32_" not in out


@pytest.mark.slow
def test_the_largest_width_is_predicted_before_it_runs(
    file: Callable[..., Path], study_program: Program, tmp_path: Path
) -> None:
    path = file()
    finish(make_plan(path), largest=False)
    status, out, _ = study_program("register", path)
    assert status == 0 and out.count("nats per token, ") == 2 * 3 and "registration.json: SHA-256 " in out
    finish(plan := make_plan(path), largest=True)
    registered = read_registration(plan.study)
    assert registered is not None and len(registered.inputs) == 2 * 2 * 3 * 2
    for run in plan.study.runs:
        if run.arm in registered.predictions:
            each = registered.predictions[run.arm]
            assert each.loss == pytest.approx(loss(run), rel=2e-3) and each.interval[0] < each.loss < each.interval[1]
    write_report(plan, "A ladder", tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert "## Scaling law" in text and "The largest width, as predicted" in text and registered.sha256 in text
    assert text.count("| yes |") + text.count("| no |") == 6 and "| E |" in text
    shown = re.search(r"!\[([^]]*)\]\(ladder.svg\)\n\n\*([^*]*)\*", text)
    assert shown and shown[1].count(": predicted ") == shown[1].count(", measured ") == 6
    assert "fitted to the smaller widths. Open diamonds are registered predictions" in shown[2]
    results = collect(plan)
    (figure,) = (
        each.figure for each in draw(plan, results, compare(results, plan.arms), find(plan)) if each.name == "ladder"
    )
    for axes, design in zip(figure.findobj(Axes), DESIGNS, strict=True):
        assert axes.get_title(loc="left") == f"({'ab'[axes is not figure.findobj(Axes)[0]]}) {design}"
        lines = [each for each in axes.lines if len(each.get_xdata()) == 40]
        assert len(lines) == 3 and all(np.diff(each.get_ydata()).max() < 0 for each in lines)


def test_a_changed_study_is_refused_by_name(file: Callable[..., Path], tmp_path: Path) -> None:
    path = file()
    finish(plan := make_plan(path), largest=False)
    where, _ = register(plan.study)
    finish(plan, largest=True)
    assert read_registration(make_plan(path).study) is not None

    def refused(said: str, overrides: list[str] | None = None, given: Path = path) -> None:
        with pytest.raises(ConfigError) as error:
            write_report(make_plan(given, overrides or []), "x", tmp_path / "report")
        assert said in str(error.value) and "\n" not in str(error.value)

    refused("optimizer.weight_decay is 0.5, but 0.01 is registered", ["optimizer.weight_decay=0.5"])
    refused("seeds (weights, data) are [[1, None]]", given=file(study_seeds=[1]))
    refused("is not registered", given=file(tokens_per_parameter=[1, 2, 3, 4]))
    refused("is not registered", given=file(widths=[16, 32, 48, 64]))
    input_run = next(run for run in plan.study.runs if run.config.model.hidden_size == 16)
    leave(input_run, 9.0)
    refused("loss of ", given=file())
    shutil.rmtree(input_run.config.output)
    refused("registered loss of ")
    leave(input_run, loss(input_run))
    assert read_registration(make_plan(path).study) is not None
    text = where.read_text()
    content = json.loads(text)
    next(iter(content["predictions"].values()))["loss"] -= 0.1
    where.write_text(json.dumps(content))
    refused("was changed after it was written: its sha256 does not fit")
    where.write_text(text[:-20])
    refused("registration.json is damaged")
    assert not (tmp_path / "report").exists()


def test_only_what_has_not_run_can_be_registered(file: Callable[..., Path], study_file: Write) -> None:
    plan = make_plan(file())

    def refused(said: str) -> None:
        with pytest.raises(ConfigError) as error:
            register(plan.study)
        assert said in str(error.value) and "\n" not in str(error.value)

    refused("24 runs of smaller widths have no loss yet, such as moe-4-8_16_1/seed-1")
    finish(plan, largest=False)
    largest = next(run for run in plan.study.runs if run.config.model.hidden_size == 64)
    leave(largest, 3.0)
    refused(f"{largest.config.output} exists: the largest width must be registered before it runs")
    shutil.rmtree(largest.config.output)
    register(plan.study)
    refused("registration.json exists: this study is registered already")
    with pytest.raises(ConfigError, match="ladder is null"):
        register(make_plan(study_file()).study)
