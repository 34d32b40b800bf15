"""Tables of losses and answers: what they say of planted gains, of several validation sets, and of final answers."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import binomtest
from study_made_up import leave

from coe_megatron.study.plan.arms import Run
from coe_megatron.study.plan.cost_table import Plan, make_plan
from coe_megatron.study.report.comparison import Summary, compare
from coe_megatron.study.report.loss_tables import (
    answers,
    conclusion,
    explanation,
    losses,
    significance,
    validation_sets,
)
from coe_megatron.study.report.results import Result, collect, results_csv

Write = Callable[..., Path]
MARGIN = 0.03
BASE, BETTER, SAME, OPEN = "base", "better", "same", "open"
NOISE = {
    BASE: [0.0] * 4,
    BETTER: [0.0, 0.01, -0.01, 0.0],
    SAME: [0.001, 0.0, 0.0, -0.001],
    OPEN: [0.1, -0.1, 0.05, 0.0],
}
GAINS = {BASE: 0.0, BETTER: 0.2, SAME: 0.0, OPEN: 0.02}


def loss_of(run: Run) -> float:
    return 4.0 + run.seed / 10 - GAINS[run.arm] + NOISE[run.arm][run.seed - 1]


@pytest.fixture
def plan(study_file: Write, tmp_path: Path) -> Plan:
    axes = {"design": {name: {"moe.topk": number} for number, name in enumerate(NOISE, 1)}}
    changes = {"axes": axes, "skip": None, "baseline": {"design": BASE}, "seeds": [1, 2, 3, 4], "margin": MARGIN}
    return make_plan(study_file(output=str(tmp_path / "out"), **changes))


@pytest.fixture
def results(plan: Plan) -> list[Result]:
    """Two validation sets, of which the second ranks the arms the other way round, and 50 problems."""
    for run in plan.study.runs:
        loss = loss_of(run)
        parts = {"math": {"loss": loss}, "te_xt": {"loss": 8.0 - loss + run.seed / 5}}
        accuracy = (10 + 5 * (run.arm == BETTER) + run.seed % 2) / 50
        leave(run, loss, valid=parts, answer_accuracy=accuracy, answer_problems=50)
    return collect(plan)


@pytest.fixture
def summaries(plan: Plan, results: list[Result]) -> list[Summary]:
    return compare(results, plan.arms, MARGIN)


def rows(text: str) -> dict[str, list[str]]:
    """The rows of the first table, without their first cell, by that cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    found: dict[str, list[str]] = {}
    for line in lines:
        first, *rest = (cell.strip() for cell in line.strip("| ").split(" | "))
        found.setdefault(first, rest)
    return found


def last(text: str, names: Sequence[str]) -> list[str]:
    return [rows(text)[name][-1] for name in names]


def test_verdicts_of_planted_gains(plan: Plan, summaries: list[Summary]) -> None:
    assert last(losses(summaries), list(NOISE)) == ["-", "better", "equivalent", "undecided"]
    tested = rows(significance(summaries, MARGIN))
    assert tested["arm"][3] == "p of equivalence (Holm)" and set(tested) == {"arm", "---", BETTER, SAME, OPEN}
    seeds = tested[OPEN][-1]
    assert int(seeds) > 4 and tested[BETTER][-1] == tested[SAME][-1] == "-"
    text = conclusion(summaries)
    assert (
        f"**Better than the baseline:** better. **Equivalent:** same. **Undecided:** open ({seeds} seeds would" in text
    )
    assert "over the 3 comparisons of the study" in explanation(summaries, MARGIN)
    assert "between -0.03 and +0.03 nats per token" in explanation(summaries, MARGIN)


def test_without_a_margin_nothing_is_equivalent(plan: Plan, results: list[Result]) -> None:
    found = compare(results, plan.arms)
    assert last(losses(found), [SAME]) == ["undecided"] and "equivalence" not in significance(found, None)
    assert "declares no margin" in explanation(found, None)


def test_every_stratum_names_its_baseline(plan: Plan, results: list[Result]) -> None:
    arms = [
        replace(each, arm=replace(each.arm, baseline=OPEN if each.arm.name == SAME else BASE)) for each in plan.arms
    ]
    arms = [replace(each, arm=replace(each.arm, baseline=OPEN)) if each.arm.name == OPEN else each for each in arms]
    table = rows(losses(compare(results, arms, MARGIN)))
    assert table["arm"][3] == "against"
    assert [table[name][3] for name in (BASE, BETTER, SAME, OPEN)] == ["-", "base", "open", "-"]


def test_a_table_for_each_validation_set(plan: Plan, results: list[Result]) -> None:
    text = validation_sets(plan, results)
    _, first, second = text.split("#### ")
    assert first.startswith("math\n") and second.startswith("te_xt\n")
    assert last(first, list(NOISE)) == ["-", "better", "equivalent", "undecided"]
    assert last(second, list(NOISE)) == ["-", "worse", "equivalent", "undecided"]
    row = next(csv.DictReader(results_csv(results).splitlines()))
    assert (float(row["valid_loss_math"]), float(row["valid_loss_te_xt"])) == pytest.approx((4.1, 4.1))


def test_final_answers(plan: Plan, results: list[Result]) -> None:
    text = answers(plan, results)
    found = rows(text)
    assert found[BETTER][1:4] == ["0.310", "+0.100", "+0.100 to +0.100"] and found[BETTER][-1] == "better"
    assert found[SAME][-1] == "equivalent"  # no answer differs
    interval = binomtest(16, 50).proportion_ci(0.95, method="wilson")
    assert f"| better | 1 | 0.320 | 50 | {interval.low:.3f} to {interval.high:.3f} |" in text
    row = list(csv.DictReader(results_csv(results).splitlines()))[4]
    assert (row["answer_accuracy"], row["answer_problems"]) == ("0.32", "50")


def test_runs_of_one_set_without_answers_have_neither_table(plan: Plan) -> None:
    for run in plan.study.runs:
        leave(run, loss_of(run))
    assert validation_sets(plan, collect(plan)) == answers(plan, collect(plan)) == ""


@pytest.mark.parametrize(
    "changes", [{"answer_accuracy": 1.5}, {"answer_problems": 0}, {"valid": {"x": {"loss": 1e300}}}]
)
def test_impossible_values_are_damage(plan: Plan, changes: dict[str, object]) -> None:
    leave(plan.study.runs[0], **changes)
    assert collect(plan)[0].state.startswith("its metrics.jsonl is damaged (step 100: ")


def test_the_largest_rise_of_a_loss(plan: Plan) -> None:
    path = leave(plan.study.runs[0], 4.0) / "metrics.jsonl"
    path.write_text(path.read_text().replace('"valid_loss": 6.0', '"valid_loss": 3.5'))
    row = next(csv.DictReader(results_csv(collect(plan)).splitlines()))
    assert float(row["largest_rise"]) == 0.5 and float(row["best_valid_loss"]) == 3.5
