"""The table of what the iterations of each arm do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from study_made_up import leave_all

from coe_megatron.study.plan.cost_table import Plan, make_plan
from coe_megatron.study.report.report import as_markdown
from coe_megatron.study.report.results import collect
from coe_megatron.study.report.why import iterations_table


@pytest.fixture
def plan(study_file: Callable[..., Path], tmp_path: Path) -> Plan:
    plan = make_plan(study_file(output=str(tmp_path / "out")))
    leave_all(plan.study.runs, lambda run: 4.0)
    return plan


def test_rows_are_means_over_layers_of_the_arms_with_chains(plan: Plan) -> None:
    _, columns, rows = iterations_table(collect(plan), {arm.arm.name: arm.arm.name for arm in plan.arms})
    # cos 0.1 in layer 1 and 0.2 in layer 2; norms 2 and 1, in both layers
    cells = ["+0.15", "+0.10 to +0.20", "0.70", "0.20", "2", "1"]
    assert rows == [["coe-2-2-8_prenorm", *cells], ["coe-2-2-8_iteration-norm", *cells]]
    assert len(columns) == len(cells) + 1


def test_runs_of_before_have_empty_cells(plan: Plan) -> None:
    for run in plan.study.runs:
        path = Path(run.config.output) / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for place in (place for line in lines for place in line.get("routing", ())):
            for name in ("increment_cosines", "single_scale", "increment_norm"):
                place.pop(name, None)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = collect(plan)
    assert all(result.finished for result in results)
    _, _, rows = iterations_table(results, {arm.arm.name: "arm" for arm in plan.arms})
    assert rows == [["arm", "-", "-", "-", "0.20", "-", "-"]] * 2


def test_the_report_has_it_only_with_chains(plan: Plan) -> None:
    results = collect(plan)
    assert "## What the iterations do\n\ncos is" in as_markdown(plan, "A study", results, [], [])
    plain = [result for result in results if result.run.config.chain.iterations == 1]
    assert "What the iterations do" not in as_markdown(plan, "A study", plain, [], [])
