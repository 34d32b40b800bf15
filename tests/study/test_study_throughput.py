"""Tokens per second over ranks: planted step times, the table, and the figure."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from study_made_up import leave

from coe_megatron.study.plan.cost_table import Plan, make_plan
from coe_megatron.study.report.comparison import compare
from coe_megatron.study.report.figures.draw import draw
from coe_megatron.study.report.report import as_markdown
from coe_megatron.study.report.results import collect, finished_results
from coe_megatron.study.report.throughput import over_ranks, ranks_table

Write = Callable[..., Path]
RANKS = {f"{ranks} ranks": {"parallel.world_size": ranks, "training.global_batch": 8} for ranks in (1, 2, 4)}
DESIGNS = {"MoE": {"chain.iterations": 1}, "CoE": {"chain.iterations": 2}}
TOKENS = 8 * 16
SECONDS = {1: 2.0, 2: 1.25, 4: 1.0}  # efficiencies 1, 0.8, 0.5


@pytest.fixture
def plan(study_file: Write, tmp_path: Path) -> Plan:
    axes = {"design": DESIGNS, "ranks": RANKS}
    changes = {"axes": axes, "skip": None, "baseline": {"design": "MoE"}, "output": str(tmp_path / "out")}
    return make_plan(study_file(**changes), machine="cpu")


def plant(plan: Plan) -> None:
    """Steps of `SECONDS`, all logged ones but the first; half as long with the second seed. No CoE on four ranks."""
    for run in plan.study.runs:
        ranks = run.config.parallel.world_size or 1
        if run.arm == "coe_4-ranks":
            continue
        path = leave(run) / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for number, line in enumerate(lines):
            line |= {"step_seconds": 99.0 if number == 1 else SECONDS[ranks] / run.seed} if number else {}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_planted_step_times_are_found_beside_predicted_ones(plan: Plan) -> None:
    plant(plan)
    results = collect(plan)
    summaries = compare(results, plan.arms)
    found = over_ranks(summaries, finished_results(results))
    assert [each.label for each in found] == ["MoE", "CoE"] or [each.label for each in found] == ["CoE", "MoE"]
    moe = next(each for each in found if each.label == "MoE")
    for point in moe.points:
        speed = TOKENS / SECONDS[point.ranks]
        assert point.measured == pytest.approx([speed, 2 * speed])
        arm = next(arm for arm in plan.arms if arm.arm.name == f"moe_{point.ranks}-ranks")
        assert arm.seconds is not None and point.predicted == pytest.approx(TOKENS * 100 / arm.seconds.steps)
    assert moe.efficiencies(predicted=False) == pytest.approx({1: 1.0, 2: 0.8, 4: 0.5})
    assert list(moe.efficiencies(predicted=True)) == [1, 2, 4]
    text = ranks_table(found)
    assert "| MoE | 2 | 154 |" in text and "| 0.80 |" in text
    (unfinished,) = (line for line in text.splitlines() if line.startswith("| CoE | 4 |"))
    assert unfinished.split(" | ")[2] == "-" and unfinished.split(" | ")[4] == "-"


def test_the_report_has_them_in_one_figure(plan: Plan) -> None:
    plant(plan)
    results = collect(plan)
    summaries = compare(results, plan.arms)
    figures = {figure.name: figure for figure in draw(plan, results, summaries)}
    assert "2 ranks 154 measured and " in figures["ranks"].alt
    text = as_markdown(plan, "A study", results, summaries, list(figures.values()))
    assert "## Scaling over ranks" in text and "](ranks.svg)" in text


def test_a_study_of_one_layout_has_neither(study_file: Write, tmp_path: Path) -> None:
    plan = make_plan(study_file(output=str(tmp_path / "out")))
    results = collect(plan)
    assert over_ranks(compare(results, plan.arms), []) == [] and ranks_table([]) == ""
