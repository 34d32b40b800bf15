"""What runs came to: rows, arms against the baseline, and the fit, on metrics that are made up."""

import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
from scipy import stats
from study_made_up import leave, leave_all

from coe_megatron.study.plan.arms import Run
from coe_megatron.study.plan.cost_table import Plan, make_plan
from coe_megatron.study.report.comparison import Summary, compare
from coe_megatron.study.report.figures.memory import pareto
from coe_megatron.study.report.results import cell, collect, results_csv, timings_csv
from coe_megatron.study.report.scaling_fit import fit

pytestmark = pytest.mark.thorough

Write = Callable[..., Path]
MOE, COE, NORM = "moe-4-8_prenorm", "coe-2-2-8_prenorm", "coe-2-2-8_iteration-norm"
LOSSES = {(MOE, 1): 4.0, (MOE, 2): 4.1, (COE, 1): 3.7, (COE, 2): 3.9, (NORM, 1): 4.2, (NORM, 2): 4.2}


def loss_of(run: Run) -> float:
    return LOSSES[run.arm, run.seed]


@pytest.fixture
def plan(study_file: Write, tmp_path: Path) -> Plan:
    return make_plan(study_file(output=str(tmp_path / "out")), machine="cpu")


def by_name(plan: Plan) -> Mapping[str, Summary]:
    compared = compare(collect(plan), plan.arms)
    return {summary.arm.arm.name: summary for summary in compared}


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def test_a_row_for_every_run(plan: Plan) -> None:
    leave_all(plan.study.runs, loss_of)
    header, first, *_ = results_csv(collect(plan)).splitlines()
    assert header == (
        "arm,axis_design,axis_norm_placement,seed,state,parameters,active_parameters,steps,flops_per_token,flops,expert_flops,"
        "memory_predicted,memory_predicted_weights,memory_predicted_gradients,memory_predicted_optimizer,"
        "memory_predicted_communication_buckets,memory_predicted_activations,memory_predicted_other,tokens,valid_loss,train_loss,best_valid_loss,largest_rise,routing_entropy,routing_load_max_over_mean,"
        "routing_dead_experts,routing_dropped,routing_overlap"
    )
    assert first.startswith("moe-4-8_prenorm,MoE(4/8),prenorm,1,finished,")
    found = rows(results_csv(collect(plan)))
    assert [float(row["valid_loss"]) for row in found] == [loss_of(run) for run in plan.study.runs]
    assert int(found[2]["parameters"]) == plan.arms[1].parameters and found[0]["routing_overlap"] == ""


def test_the_same_runs_give_the_same_bytes_in_how_many_attempts_ever(plan: Plan) -> None:
    leave_all(plan.study.runs, loss_of)
    before, timings = results_csv(collect(plan)), timings_csv(collect(plan))
    leave(plan.study.runs[0], 4.0, attempts=3, step_seconds=9.0, tokens_per_second=1.0, memory={"peak": 1 << 40})
    assert results_csv(collect(plan)) == before and timings_csv(collect(plan)) != timings
    row = rows(timings_csv(collect(plan)))[0]
    assert (row["attempts"], row["memory_measured"]) == ("3", str(1 << 40))


def test_seconds_are_those_of_all_steps(plan: Plan) -> None:
    run = plan.study.runs[0]
    leave(run)
    result = collect(plan)[0]
    taken = [line["step_seconds"] for line in result.lines[1:]]
    assert len(taken) == 4 and result.seconds == pytest.approx(25 * sum(taken))


def test_an_axis_may_have_the_name_of_a_column(study_file: Write, tmp_path: Path) -> None:
    axes = {"steps": {"short": {"training.steps": 100}, "long": {"training.steps": 200}}}
    file = study_file(output=str(tmp_path / "out"), axes=axes, skip=None, baseline={"steps": "short"})
    found = rows(results_csv(collect(make_plan(file))))
    assert [(row["axis_steps"], row["steps"]) for row in found[1:3]] == [("short", "100"), ("long", "200")]


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"outcome": "running"}, "running"),
        ({"outcome": "interrupted"}, "interrupted"),
        ({"outcome": "failed: ValueError: no, not so"}, "failed: ValueError: no, not so"),
        ({"valid_loss": None}, "finished, but without a validation loss after the last step"),
        ({"step": 90}, "finished, but without a validation loss after the last step"),
        (
            {"valid_loss": "low"},
            "its metrics.jsonl cannot be read (line 5: valid_loss: Input should be a valid number)",
        ),
        ({"tokens": 10**19}, "its metrics.jsonl cannot be read (line 5: tokens: "),
        ({"memory": None}, "its metrics.jsonl cannot be read (line 5: memory: "),
        ({"memory": {}}, "its metrics.jsonl is damaged (step 100: memory.peak: Field required)"),
        ({"routing": []}, "its metrics.jsonl is damaged (step 100: routing: List should have at least 1 item"),
        ({"routing": [{"layer": 1}]}, "its metrics.jsonl is damaged (step 100: routing.0.iteration: Field required)"),
        ({"train_loss": "x"}, "its metrics.jsonl cannot be read (line 5: train_loss: Input should be a valid number)"),
        (
            {"routing_entropy": "x"},
            "its metrics.jsonl is damaged (step 100: routing_entropy: Input should be a valid number)",
        ),
        (
            {"answer_groups": {"1 hop": {"accuracy": 2, "problems": 4}}},
            "its metrics.jsonl is damaged (step 100: answer_groups.1 hop.accuracy: Input should be",
        ),
        ({"valid_loss": 1e300}, "its metrics.jsonl is damaged (step 100: valid_loss: Input should be less than"),
        (
            {"step_seconds": None},
            "its metrics.jsonl is damaged (step 100: step_seconds: Input should be a valid number)",
        ),
    ],
)
def test_what_is_not_finished_counts_in_nothing(plan: Plan, changes: Mapping[str, object], state: str) -> None:
    leave(plan.study.runs[2], **changes)
    leave(plan.study.runs[3], 3.9)
    results = collect(plan)
    assert results[2].state.startswith(state) and not results[2].finished
    assert compare(results, plan.arms)[1].losses == {2: 3.9}
    row = rows(results_csv(results))[2]
    assert (row["state"], row["valid_loss"]) == (results[2].state, "")
    assert len(rows(timings_csv(results))) == 1


def test_a_run_of_other_settings_counts_in_nothing(plan: Plan) -> None:
    run = plan.study.runs[0]
    leave(replace(run, config=replace(run.config, moe=replace(run.config.moe, topk=3))))
    assert collect(plan)[0].state == "was run with moe.topk 3, but the study now has 4"
    assert by_name(plan)[MOE].losses == {}


@pytest.mark.parametrize(
    ("file", "text", "state"),
    [
        ("config.yaml", "model: [", "has settings that cannot be read ("),
        ("run.json", "{", "unreadable"),
        ("metrics.jsonl", "{\n", "its metrics.jsonl cannot be read"),
        ("metrics.jsonl", "[1]\n", "its metrics.jsonl cannot be read (line 1: "),
        ("metrics.jsonl", '{"step": 100, "valid_loss": 4.0}\n', "its metrics.jsonl is damaged (no line is of a step)"),
    ],
)
def test_files_that_cannot_be_read_cost_their_run_alone(plan: Plan, file: str, text: str, state: str) -> None:
    leave(plan.study.runs[1])
    (leave(plan.study.runs[0]) / file).write_text(text)
    results = collect(plan)
    assert results[0].state.startswith(state) and "\n" not in results[0].state
    assert [result.finished for result in results] == [False, True] + [False] * 4


def test_steps_that_do_not_rise_are_damage(plan: Plan) -> None:
    path = leave(plan.study.runs[0]) / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 75', '"step": 50'))
    assert collect(plan)[0].state == "its metrics.jsonl is damaged (step 50 follows step 50)"


@pytest.mark.parametrize("part", [{"load": [1.0] * 7}, {"load": [1.0] * 8, "pairs": [[1] * 8] * 7}])
def test_routing_of_another_number_of_experts_is_damage(plan: Plan, part: Mapping[str, object]) -> None:
    place = {"layer": 1, "iteration": 1, "state_norm": 1.0, "increment_over_state": None, **part}
    leave(plan.study.runs[0], routing=[place])
    assert collect(plan)[0].state == "its metrics.jsonl is damaged (step 100: routing is not that of 8 experts)"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("=1+1", "'=1+1"), ("+x", "'+x"), ("-x", "'-x"), ("@x", "'@x"), ("\tx", "'\tx"), ("\rx", "'\rx"),
        (" =x", "' =x"), ("\uff1dx", "'\uff1dx"), ("-1.5e-3", "-1.5e-3"), ("+1", "+1"), ("a=1", "a=1"),
        (-1.0, -1.0), (None, None), ("", ""),
    ],
)  # fmt: skip
def test_text_in_a_cell_is_no_formula_and_a_number_is_one(text: object, shown: object) -> None:
    assert cell(text) == shown


def test_nothing_has_begun(plan: Plan) -> None:
    assert {result.state for result in collect(plan)} == {"not started"}
    assert [summary.mean for summary in by_name(plan).values()] == [None] * 3


def test_two_seeds_by_hand(plan: Plan) -> None:
    """Gains of 0.3 and 0.2: 0.25 on average, with a standard error of 0.05, and t(0.975, 1) is 12.7062."""
    leave_all(plan.study.runs, loss_of)
    found = by_name(plan)[COE]
    assert found.mean == pytest.approx(3.8) and found.std == pytest.approx(0.2 / math.sqrt(2))
    assert found.gain == pytest.approx(0.25) and found.gains == pytest.approx({1: 0.3, 2: 0.2})
    assert found.interval == pytest.approx((0.25 - 12.7062 * 0.05, 0.25 + 12.7062 * 0.05), abs=1e-5)
    assert found.verdict == "" and by_name(plan)[MOE].gain is None and by_name(plan)[MOE].is_baseline


FIVE = {MOE: [4.0, 4.2, 4.1, 4.4, 4.3], COE: [3.9, 4.0, 4.02, 4.3, 4.1], NORM: [4.5, 4.6, 4.7, 4.9, 4.8]}


@pytest.fixture
def plan_of_five(study_file: Write, tmp_path: Path) -> Plan:
    plan = make_plan(study_file(output=str(tmp_path / "out"), seeds=[1, 2, 3, 4, 5], margin=0.03))
    leave_all(plan.study.runs, lambda run: FIVE[run.arm][run.seed - 1])
    return plan


def test_gains_are_scipys_paired_test(plan_of_five: Plan) -> None:
    for arm, verdict in ((COE, "better"), (NORM, "worse")):
        found, tested = by_name(plan_of_five)[arm], stats.ttest_rel(FIVE[MOE], FIVE[arm])
        assert found.comparison is not None and found.verdict == verdict
        assert found.comparison.sample.p == pytest.approx(tested.pvalue)
        assert found.interval == pytest.approx(tuple(tested.confidence_interval(0.95)))
        assert found.gain == pytest.approx(mean(FIVE[MOE]) - mean(FIVE[arm]))


def test_p_values_of_a_study_are_corrected_together(plan_of_five: Plan) -> None:
    """Of two comparisons, the smaller p is doubled."""
    coe, norm = (by_name(plan_of_five)[arm].comparison for arm in (COE, NORM))
    assert coe is not None and norm is not None and coe.sample.p > norm.sample.p
    assert (coe.p_adjusted, norm.p_adjusted) == pytest.approx((coe.sample.p, 2 * norm.sample.p))
    assert coe.tests == norm.tests == 2


def test_an_arm_is_compared_with_its_own_baseline(plan_of_five: Plan) -> None:
    arms = [replace(plan, arm=replace(plan.arm, baseline=NORM)) for plan in plan_of_five.arms]
    found = {summary.arm.arm.name: summary for summary in compare(collect(plan_of_five), arms)}
    assert found[NORM].is_baseline and found[NORM].comparison is None
    assert found[COE].gain == pytest.approx(mean(FIVE[NORM]) - mean(FIVE[COE]))


def test_seeds_that_the_baseline_lacks_are_no_pairs(plan: Plan) -> None:
    leave_all([run for run in plan.study.runs if (run.arm, run.seed) != (MOE, 2)], loss_of)
    found = by_name(plan)[COE]
    assert (found.gains, found.interval) == (pytest.approx({1: 0.3}), None)
    assert found.losses == {1: 3.7, 2: 3.9} and found.std == stdev([3.7, 3.9]) and found.verdict == ""


def test_an_arm_that_a_setting_without_effect_makes(study_file: Write, tmp_path: Path) -> None:
    plan = make_plan(study_file(output=str(tmp_path / "out"), seeds=[1, 2, 3]))
    leave_all(plan.study.runs, lambda run: 4.0 + run.seed / 10)
    found = by_name(plan)[COE]
    assert (found.gain, found.interval, found.verdict) == (0.0, (0.0, 0.0), "equivalent")


def fitted_plan(study_file: Write, tmp_path: Path, designs: Mapping[str, Mapping[str, object]]) -> Plan:
    changes = {"axes": {"design": designs}, "skip": None, "baseline": {"design": next(iter(designs))}}
    return make_plan(study_file(output=str(tmp_path / "out"), **changes))


def test_the_fit_finds_planted_exponents(study_file: Write, tmp_path: Path) -> None:
    designs = {
        f"{n} {c} {steps}": {"moe.num_experts": n, "chain.iterations": c, "training.steps": steps}
        for n in (8, 32)
        for c in (1, 2)
        for steps in (100, 200)
    }
    plan = fitted_plan(study_file, tmp_path, designs)
    arms = {arm.arm.name: arm for arm in plan.arms}

    def planted(run: Run) -> float:
        arm, c = arms[run.arm], run.config.chain.iterations
        return 9 * arm.parameters**-0.05 * arm.flops**-0.02 * c**0.03 * (1 + 1e-6 * run.seed)

    leave_all(plan.study.runs, planted)
    found = fit(compare(collect(plan), plan.arms))
    assert found is not None and (found.points, found.excluded) == (8, [])
    assert [each.of for each in found.coefficients] == ["parameters", "FLOPs", "C"]
    assert [each.value for each in found.coefficients] == pytest.approx([-0.05, -0.02, 0.03], abs=1e-6)
    assert all(each.interval[0] < each.value < each.interval[1] for each in found.coefficients)
    assert found.residual < 1e-6


def test_the_fit_leaves_out_what_hardly_varies_or_follows(study_file: Write, tmp_path: Path) -> None:
    """Steps alone differ: parameters and C are the same in all arms."""
    designs = {str(steps): {"training.steps": steps} for steps in (100, 200, 400)}
    plan = fitted_plan(study_file, tmp_path, designs)
    leave_all(plan.study.runs, lambda run: run.config.training.steps**-0.1)
    found = fit(compare(collect(plan), plan.arms))
    assert found is not None and found.excluded == ["parameters", "C"]
    assert [(each.of, round(each.value, 9)) for each in found.coefficients] == [("FLOPs", -0.1)]


def test_seeds_are_no_points_of_a_fit(plan: Plan) -> None:
    """Two designs, one of them in two topologies, six runs: two points, and no line that could be wrong."""
    leave_all(plan.study.runs, loss_of)
    assert fit(list(by_name(plan).values())) is None
    assert fit([]) is None


def test_pareto() -> None:
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 3.0), (2.0, 2.0), (4.0, 1.0), (1.0, 4.0)]
    assert pareto(points) == [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]
    assert pareto([]) == []
