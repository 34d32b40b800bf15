"""Effective speed-up and loss at equal memory, on curves that are planted."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_made_up import leave, leave_all

from coe_megatron.study.plan.cost_table import Plan, make_plan
from coe_megatron.study.report.comparison import compare
from coe_megatron.study.report.cost_tables import loss_at_equal_memory, speedup
from coe_megatron.study.report.equal_memory import Size, equal_memory, front, loss_at, peak_memory
from coe_megatron.study.report.results import Result, collect
from coe_megatron.study.report.speedup import Reached, factor, learning_curve, reached, speedups

Write = Callable[..., Path]
MIB = 2**20
MOE, COE = "moe-4-8", "coe-2-2-8"
DESIGNS = {
    "MoE(4/8)": {"chain.iterations": 1, "moe.topk": 4},
    "CoE-2(2/8)": {"chain.iterations": 2, "moe.topk": 2},
}


def curve(steps: float) -> float:
    """The planted loss of the baseline: linear in the logarithm of steps."""
    return 6.0 - 0.5 * math.log(steps)


POINTS = [(step, curve(step)) for step in (25, 50, 100, 200, 400)]


@given(st.floats(25, 400))
def test_a_planted_curve_is_reached_where_it_was_planted(steps: float) -> None:
    found = reached(POINTS, curve(steps))
    assert found.amount == pytest.approx(steps) and found.bound == ""


def test_a_curve_is_not_extrapolated_and_its_first_crossing_counts() -> None:
    assert reached(POINTS, curve(401)) == Reached(400, ">")
    assert reached(POINTS, curve(20)) == Reached(25, "<")
    assert reached([(10, 5.0), (100, 4.0), (200, 6.0), (400, 3.0)], 4.5).amount == pytest.approx(math.sqrt(1000))
    assert reached([(1, 2.0)], 2.0) == Reached(1)


def test_factors_over_seeds() -> None:
    exact = factor([Reached(2.0), Reached(8.0), Reached(4.0)])
    assert exact is not None and exact.mean == pytest.approx(4.0)
    reach = 4.302653 * math.log(2) / math.sqrt(3)
    assert exact.interval == pytest.approx((4 * math.exp(-reach), 4 * math.exp(reach)), rel=1e-5)
    bounded = factor([Reached(2.0), Reached(8.0, ">")])
    assert bounded is not None and (bounded.mean, bounded.bound, bounded.interval) == (pytest.approx(4.0), ">", None)
    assert factor([Reached(2.0, "<"), Reached(8.0, ">")]) is None


@pytest.fixture
def plan(study_file: Write, tmp_path: Path) -> Plan:
    changes = {"axes": {"design": DESIGNS}, "skip": None, "baseline": {"design": "MoE(4/8)"}, "seeds": [1, 2, 3]}
    return make_plan(study_file(output=str(tmp_path / "out"), **changes))


def plant(plan: Plan, needed: Callable[[int], float]) -> dict[str, dict[int, Result]]:
    """Runs of which the baseline has the planted curve, and the arm ends where that curve is after `needed` steps."""
    for run in plan.study.runs:
        shift = run.seed / 10
        leave(run, curve(needed(run.seed)) + shift)
        if run.arm == MOE:
            path = Path(run.config.output) / "metrics.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line in lines:
                line |= {"valid_loss": curve(line["step"]) + shift if line["step"] else 9.0}
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found: dict[str, dict[int, Result]] = {}
    for result in collect(plan):
        assert result.finished
        found.setdefault(result.run.arm, {})[result.run.seed] = result
    return found


def test_the_planted_speedup_is_found(plan: Plan) -> None:
    """The arm needs 100 steps for what the baseline reaches after 40, 50 and 62.5."""
    runs = plant(plan, lambda seed: {1: 40, 2: 50, 3: 62.5}[seed])
    assert [step for step, _ in learning_curve(runs[MOE][1])] == [25, 50, 75, 100]
    found = speedups(runs[COE], runs[MOE])
    steps, flops = found["steps"], found["FLOPs"]
    assert steps is not None and flops is not None and steps.interval is not None
    assert steps.mean == pytest.approx(0.5, abs=1e-6) and steps.interval[0] < 0.4 < 0.62 < steps.interval[1]
    assert flops.mean == pytest.approx(0.5 * plan.arms[0].flops / plan.arms[1].flops)
    assert flops.mean < steps.mean  # a chain's shared expert runs twice


def test_a_loss_that_the_baseline_never_reaches(plan: Plan) -> None:
    runs = plant(plan, lambda seed: 200 if seed == 1 else 50)
    found = speedups(runs[COE], runs[MOE])["steps"]
    assert found is not None and (found.bound, found.interval) == (">", None)
    assert found.mean == pytest.approx((1.0 * 0.5 * 0.5) ** (1 / 3))
    text = speedup(plan, [result for arm in runs.values() for result in arm.values()], {})
    assert "| CoE-2(2/8) | &gt; 0.63 | &gt; 0.63 | &gt; " in text and "too favourable" not in text
    assert speedups(runs[COE], {}) == {}


def test_a_decayed_learning_rate_is_said(study_file: Write, tmp_path: Path) -> None:
    for decay, said in (("constant", False), ("cosine", True), ("wsd", True)):
        changes = {"axes": {"design": DESIGNS}, "skip": None, "baseline": {"design": "MoE(4/8)"}}
        settings = {"optimizer.decay": decay}
        plan = make_plan(study_file(output=str(tmp_path / decay), set=settings, **changes))
        leave_all(plan.study.runs, lambda run: 4.0)
        assert ("these factors are too favourable" in speedup(plan, collect(plan), {})) == said


def sizes(*points: tuple[float, float]) -> list[Size]:
    return [Size(str(number), memory, {1: loss, 2: loss + 1}) for number, (memory, loss) in enumerate(points)]


def test_the_front_is_interpolated_in_the_logarithm_of_memory() -> None:
    found = front(sizes((400, 3.0), (100, 5.0), (200, 6.0), (300, 3.0)))
    assert [size.name for size in found] == ["1", "3"]
    assert loss_at(math.sqrt(100 * 300), found) == pytest.approx({1: 4.0, 2: 5.0})
    assert loss_at(300, found) == pytest.approx({1: 3.0, 2: 4.0}) and loss_at(301, found) == loss_at(99, found) == {}
    assert loss_at(100, found[:1]) == {1: 5.0, 2: 6.0} and loss_at(101, found[:1]) == {}


@pytest.fixture
def sized(study_file: Write, tmp_path: Path) -> Plan:
    """The baseline with 8, 16 and 32 experts, a chain with 16, and a MoE with other choices."""
    designs = {
        f"MoE(4/{experts})": {"chain.iterations": 1, "moe.topk": 4, "moe.num_experts": experts}
        for experts in (8, 16, 32)
    }
    designs["CoE-2(2/16)"] = {"chain.iterations": 2, "moe.topk": 2, "moe.num_experts": 16}
    designs["MoE(2/16)"] = {"chain.iterations": 1, "moe.topk": 2, "moe.num_experts": 16}
    changes = {"axes": {"design": designs}, "skip": None, "baseline": {"design": "MoE(4/8)"}, "seeds": [1, 2, 3]}
    return make_plan(study_file(output=str(tmp_path / "out"), margin=0.01, **changes))


def test_loss_at_equal_memory(sized: Plan) -> None:
    """The baseline gains 0.5 whenever its memory doubles. The chain has 1.5 times that of the smallest size."""
    memory = {"moe-4-8": 100, "moe-4-16": 200, "moe-4-32": 400, "coe-2-2-16": 150, "moe-2-16": 500}
    losses = {"moe-4-8": 4.0, "moe-4-16": 3.5, "moe-4-32": 3.0, "coe-2-2-16": 3.4, "moe-2-16": 3.2}
    for run in sized.study.runs:
        wobble = 0.001 * run.seed if run.arm == "coe-2-2-16" else 0.0
        leave(run, losses[run.arm] + run.seed / 10 + wobble, memory={"peak": memory[run.arm] * 10 * MIB})
    results = collect(sized)
    summaries, peaks = compare(results, sized.arms), peak_memory(results)
    found = equal_memory(summaries, peaks, [], 0.01)
    assert set(found) == {"coe-2-2-16", "moe-2-16"}  # sizes of the baseline are not compared with themselves
    chain = found["coe-2-2-16"]
    assert [size.name for size in chain.sizes] == ["moe-4-8", "moe-4-16", "moe-4-32"]
    assert chain.comparison is not None and chain.factor is not None and chain.comparison.verdict == "better"
    assert chain.comparison.sample.mean == pytest.approx(4.0 - 0.5 * math.log2(1.5) - 3.402)
    assert chain.factor.mean == pytest.approx(2 ** (0.598 / 0.5) / 1.5)
    assert found["moe-2-16"].comparison is None  # it has more memory than every size
    text = loss_at_equal_memory(summaries, found)
    assert "| MoE(2/16) | 5,000.0 | outside of the sizes |" in text and "MoE(4/32) (4,000.0 MiB)" in text


def test_other_settings_make_no_size(sized: Plan) -> None:
    """Not a MoE with other steps, unless the budget solves for these."""
    leave_all(sized.study.runs, lambda run: 4.0)
    results = collect(sized)
    arms = list(sized.arms)
    config = arms[1].arm.config
    arms[1] = replace(
        arms[1], arm=replace(arms[1].arm, config=replace(config, training=replace(config.training, steps=7)))
    )
    summaries = compare(results, arms)
    for solved, count in (([], 2), (["training.steps"], 3)):
        peaks = {"moe-4-8": 100.0, "moe-4-16": 200.0, "moe-4-32": 400.0, "coe-2-2-16": 150.0}
        own = [replace(each, losses={1: 4.0 - number}) for number, each in enumerate(summaries)]
        assert len(equal_memory(own, peaks, solved, None)["coe-2-2-16"].sizes) == count


def test_a_baseline_of_one_size_gives_no_table(plan: Plan) -> None:
    plant(plan, lambda seed: 50)
    results = collect(plan)
    summaries = compare(results, plan.arms)
    found = equal_memory(summaries, peak_memory(results), [], None)
    assert loss_at_equal_memory(summaries, found) == ""
    chain = found[COE].factor
    assert chain is not None and (chain.bound, chain.mean) == ("<", pytest.approx(402 / 404))
