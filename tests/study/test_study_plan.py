"""What `study.py plan` says; every study of the project plans; and its arms are the models of the single configs."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, python

from coe_megatron.config import load
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.machine import machine
from coe_megatron.estimate.run_estimate import estimate
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.run_time import run_time
from coe_megatron.estimate.step_time import step_time
from coe_megatron.study.plan.arms import make_study
from coe_megatron.study.plan.cost_table import make_plan
from coe_megatron.study.plan.study_file import read_study
from coe_megatron.text import format_duration

Write = Callable[..., Path]
STUDIES = ROOT / "configs" / "studies"
FILES = sorted(path for path in STUDIES.rglob("*.yaml") if path.stem not in {"common", "topologies", "small", "claims"})
OTHERS = (
    "upcycling",
    "hops",
    "ladder",
    "controls",
    "claims-",
    "paper-claims",
    "strong-scaling",
    "weak-scaling",
)  # the rest are of the paper, in both sizes
NAMES = {path.stem for path in FILES if not path.stem.startswith(OTHERS)}
NORM_PLACEMENTS = {"reference", "prenorm", "iteration_norm"}
# Arms of studies, and the configs of single arms that are the same models.
SINGLE = {
    ("main-pair", "MoE(8/64)"): "moe_8-64",
    ("main-pair", "CoE-2(4/64)"): "coe-2_4-64",
    ("width", "MoE(16/64)"): "moe_16-64",
    ("width", "MoE(24/64)"): "moe_24-64",
    ("width", "CoE-2(8/64)"): "coe-2_8-64",
    ("depth", "MoE(8/64) L8"): "moe_8-64_8-layers",
    ("depth", "MoE(8/64) L12"): "moe_8-64_12-layers",
    ("fewer-experts", "CoE-2(4/48)"): "coe-2_4-48",
    ("dense-control", "MoE(8/8)"): "moe_8-8",
    ("dense-control", "CoE-2(8/8)"): "coe-2_8-8",
    ("gating", "shared_router"): "coe-2_4-64_shared-router",
    ("gating", "fixed"): "coe-2_4-64_fixed",
    ("residual", "outer"): "coe-2_4-64_outer",
    ("residual", "init"): "coe-2_4-64_init",
    ("iterations", "CoE-3(8/64)"): "coe-3_8-64",
    ("iterations", "CoE-4(8/64)"): "coe-4_8-64",
}


@pytest.mark.thorough
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_study_of_the_project_plans(path: Path) -> None:
    plan = make_plan(path, ["data.path=nowhere"])
    assert plan.study.settings.output == f"runs/studies/{path.parent.name}/{path.stem}"
    if path.stem in NAMES - {"search"}:
        assert {arm.labels["norm_placement"] for arm in plan.study.arms} == NORM_PLACEMENTS
    assert not any(arm.too_large for arm in plan.arms)
    counts = (
        {"learning-rate": 1, "controls-long": 5, "ladder-rate": 1, "ladder": 2} if path.parent.name == "cpu" else {}
    )
    counts |= {"strong-scaling": 1, "weak-scaling": 1}  # of their speed
    assert len(plan.study.settings.seeds) == counts.get(path.stem, 3)
    if path.parent.name == "cpu":
        assert max(arm.seconds.total for arm in plan.arms if arm.seconds) <= 600
    if plan.study.settings.ladder is not None or path.stem.endswith("scaling"):  # final losses alone, or none
        return
    trainings = [arm.config.training for arm in plan.study.arms]
    assert all(math.ceil(training.steps / training.evaluate_every) >= 10 for training in trainings)  # for speed-ups


def test_the_papers_studies_are_there_in_both_sizes() -> None:
    assert {study for study, _ in SINGLE} | {
        "main-pair-equal-flops",
        "equal-memory",
        "learning-rate",
        "long",
        "search",
    } == NAMES
    assert {(path.parent.name, path.stem) for path in FILES if path.stem in NAMES} == {
        (size, name) for size in ("paper", "cpu") for name in NAMES
    }


@pytest.mark.thorough
@pytest.mark.parametrize("size", ["paper", "cpu"])
@pytest.mark.parametrize(("where", "name"), SINGLE.items(), ids=SINGLE.values())
def test_arms_are_the_models_of_the_single_configs(size: str, where: tuple[str, str], name: str) -> None:
    study = make_study(read_study(STUDIES / size / f"{where[0]}.yaml"))
    labels = {"design": where[1], "norm_placement": "prenorm"}
    (arm,) = (arm for arm in study.arms if arm.labels == labels)
    single = load(ROOT / "configs" / size / f"{name}.yaml")
    for section in ("model", "moe", "chain", "optimizer", "zero", "parallel"):
        assert getattr(arm.config, section) == getattr(single, section), section
    if size == "paper":
        kept = asdict(single.training) | {"seed": 1}
        assert asdict(arm.config.training) == kept


def test_every_single_config_of_the_paper_is_an_arm() -> None:
    for size in ("paper", "cpu"):
        there = {path.stem for path in (ROOT / "configs" / size).glob("*.yaml")} - {
            "base",
            "sizes",
            "small-sizes",
            "blend",
        }
        assert there == set(SINGLE.values())


def test_a_row_says_what_the_dry_run_says(study_file: Write) -> None:
    plan = make_plan(study_file(), machine="cpu")
    for arm in plan.arms:
        said = estimate(RunShape.of(arm.arm.config, 64))
        assert (arm.parameters, arm.memory) == (said.parameters.total, said.needed)
        assert arm.components["communication_buckets"] == said.memory["communication_buckets"] > 0
        assert arm.flops_per_token == said.flops_per_token.total
        assert arm.flops == 100 * said.tokens_per_step * said.flops_per_token.total
        assert arm.expert_flops < arm.flops
    assert plan.device_seconds == pytest.approx(2 * sum(arm.seconds.total for arm in plan.arms if arm.seconds))


def test_the_plan_names_the_baselines(study_file: Write) -> None:
    skip = {"where": {"design": "MoE(4/8)", "norm_placement": "iteration_norm"}, "reason": "it is prenorm"}
    depth = {"model.num_layers": [1, 2]}
    axes = read_study(study_file()).axes | {"depth": depth}
    skips = [skip | {"use": {"norm_placement": "prenorm"}}]
    table = make_plan(study_file(axes=axes, skip=skips, baseline={"design": "MoE(4/8)"})).table()
    assert "* 2 baselines: an arm is compared with the one of its norm_placement, depth" in table
    assert "coe-2-2-8_iteration-norm_1 is compared with moe-4-8_prenorm_1" in table
    assert table.count(" is compared with moe") == 2 and "moe-4-8_prenorm_2*" in table


@pytest.mark.thorough
@pytest.mark.parametrize("size", ["paper", "cpu"])
def test_the_study_at_equal_memory_has_it_equal_and_moves_what_it_is_made_of(size: str) -> None:
    plan = make_plan(STUDIES / size / "equal-memory.yaml", ["data.path=nowhere"])
    baseline = next(arm for arm in plan.arms if arm.arm is plan.study.baseline)
    for arm in plan.arms:
        assert arm.memory == pytest.approx(baseline.memory, rel=0.01)
        if "L6" in arm.arm.name.upper():  # fewer experts pay for the activations of two layers more
            assert arm.components["optimizer"] < 0.97 * baseline.components["optimizer"]
            assert arm.components["activations"] > 1.05 * baseline.components["activations"]


def test_runs_of_any_size_are_priced_by_the_predicted_time_of_their_steps(study_file: Write) -> None:
    h100 = machine("h100")
    for ranks in (1, 16):  # of one device, and of two nodes
        plan = make_plan(study_file(), [f"parallel.world_size={ranks}", "training.global_batch=32"], "h100", price=2.0)
        for arm in plan.arms:
            run = RunShape.of(arm.arm.config, 64)
            assert arm.ranks == ranks and arm.seconds == run_time(run, h100, step_time(run, h100), 8)
        assert plan.device_seconds == pytest.approx(
            2 * ranks * sum(arm.seconds.total for arm in plan.arms if arm.seconds)
        )
        assert plan.cost == pytest.approx(2.0 * plan.device_seconds / 3600)


def test_the_price_is_the_machines_unless_one_is_given(study_file: Write, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {ROOT / 'coe_megatron' / 'machines' / 'h100.yaml'}\nprice: 3.0\n")
    plans = [make_plan(study_file(), machine=str(mine), price=price) for price in (None, 5.0)]
    assert [plan.price for plan in plans] == [3.0, 5.0] and all(plan.cost for plan in plans)


def test_the_table_and_what_stands_below(study_file: Write) -> None:
    budget = {"equal": "flops", "solve": "moe.ffn_hidden_size", "range": [4, 64], "multiple_of": 4, "tolerance": 0.3}
    plan = make_plan(study_file(budget=budget), machine="cpu", device_memory="1MiB", price=2.0)
    text = plan.table()
    header, *rows = text.splitlines()
    assert "moe.ffn_hidden_size  deviation" in header
    assert rows[0].startswith("moe-4-8_prenorm*") and rows[0].endswith("16     +0.00%")
    memory = text.partition("\n\n")[2].splitlines()
    assert " ".join(memory[0].split()) == (
        "peak MiB per rank weights gradients optimizer communication buckets activations other total"
    )
    for line, arm in zip(memory[1:4], plan.arms, strict=True):
        assert line.split() == [
            arm.arm.name,
            *(f"{size / 2**20:.1f}" for size in (*arm.components.values(), arm.memory)),
        ]
    assert "6 runs: 3 arms, 2 seeds each; " in text and f", {plan.cost:,.2f} at 2 per hour" in text
    assert "coe-2-2-8_prenorm does not fit: a rank needs" in text
    assert "skipped, at C = 1 it is prenorm: MoE(4/8) iteration_norm" in text
    assert "flops equal to the baseline's: moe.ffn_hidden_size is solved for it" in text
    assert len({len(row) for row in text.splitlines()[:4]}) == 1


def test_without_a_machine_hours_are_not_known(study_file: Write) -> None:
    plan = make_plan(study_file(), price=2.0)
    assert (plan.device_seconds, plan.cost, plan.speed) == (None, None, None)
    assert [row.split()[-1] for row in plan.table().splitlines()[1:4]] == ["-"] * 3
    assert plan.as_dict()["total"]["device_seconds"] is None


def test_json_holds_every_arm_and_run(study_file: Write) -> None:
    said = json.loads(json.dumps(make_plan(study_file(), machine="a100").as_dict()))
    assert [arm["name"] for arm in said["arms"]] == ["moe-4-8_prenorm", "coe-2-2-8_prenorm", "coe-2-2-8_iteration-norm"]
    assert said["arms"][1]["runs"] == [f"runs/small/coe-2-2-8_prenorm/seed-{seed}" for seed in (1, 2)]
    assert said["baseline"] == "moe-4-8_prenorm" and said["total"]["runs"] == 6
    memory = said["arms"][0]["memory_bytes_per_rank"]
    assert memory.pop("total") == sum(memory.values()) and memory["communication_buckets"] > 0
    assert said["skipped"] == [
        {"labels": {"design": "MoE(4/8)", "norm_placement": "iteration_norm"}, "reason": "at C = 1 it is prenorm"}
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"machine": "h300"}, "--machine is h300: it must be a machine file, or one of a100, "),
        ({"device_memory": "80"}, "--device-memory '80' must be a number above 0 and one of GiB"),
        ({"machine": "h200", "device_memory": "80"}, "--device-memory '80' must be"),
        ({"calibration": Path("nowhere")}, "--calibration requires a machine: name it in the study file (machine) or"),
        ({"overrides": ["moe.topk=2"]}, "moe.topk is set for all arms: axes.design sets it too"),
        ({"overrides": ["training.steps"]}, "override 'training.steps': write it as key.sub=value"),
    ],
)
def test_mistakes_in_options(study_file: Write, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_plan(study_file(), **options)
    assert said in str(error.value)


def test_the_machine_of_a_file_is_checked_too(study_file: Write) -> None:
    with pytest.raises(ConfigError, match=r"^machine is h300: it must be a machine file, or one of"):
        make_plan(study_file(machine="h300"))


def test_the_example_of_the_documents_is_a_study(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "studies.md").read_text()
    example = page.partition("```yaml\n")[2].partition("```")[0]
    path = tmp_path / "study.yaml"
    path.write_text(example.replace("../../paper", str(ROOT / "configs" / "paper")))
    plan = make_plan(path)
    assert [arm.solved.value for arm in plan.arms if arm.solved] == [1200, 1200, 1150, 1150, 1150]


@pytest.mark.parametrize(("seconds", "text"), [(59, "59 s"), (60, "1.0 min"), (5400, "1.5 h")])
def test_spans(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_planning_needs_no_torch(study_file: Write) -> None:
    code = (
        "import sys; from coe_megatron.cli import study; status = study.main(sys.argv[1:]); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "plan", str(study_file()), "--machine", "cpu", "training.steps=7", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {arm["steps"] for arm in json.loads(done.stdout)["arms"]} == {7}


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"seeds": [1, 1]}, (), "study.py: error: seeds is [1, 1]: seeds must differ\n"),
        ({}, ("--jsno",), "study.py: error: unrecognized arguments: --jsno\n"),
        ({}, ("--price", "-1"), "study.py plan: error: argument --price: -1 must be a number of at least 0\n"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    study_file: Write, changes: dict[str, Any], options: tuple[str, ...], said: str
) -> None:
    done = python("launch/study.py", "plan", study_file(**changes), *options)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
