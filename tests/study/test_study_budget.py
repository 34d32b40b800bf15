"""The budget solver: the best whole number for every quantity, refusals, and its arms recomputed from built models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from flops_counted import counting
from model_build import reset_megatron

from coe_megatron.errors import ConfigError
from coe_megatron.estimate.machine import machine
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.model.build import build_model
from coe_megatron.study.plan.amounts import Amounts, Speed
from coe_megatron.study.plan.arms import make_study
from coe_megatron.study.plan.budget import Solved, nearest, solve
from coe_megatron.study.plan.study_file import Quantity, read_study

Write = Callable[..., Path]
AMOUNTS = Amounts(Speed(machine("cpu"), startup=0.01, saving=0.001))
# The chain has a tenth more to do than the baseline in everything but memory, and other sizes where these are solved.
SOLVED = [
    ("expert_compute", "training.steps", [50, 120], 1),
    ("flops", "training.steps", [50, 120], 1),
    ("flops", "moe.ffn_hidden_size", [4, 64], 4),
    ("parameters", "moe.num_experts", [2, 64], 1),
    ("parameters", "model.hidden_size", [8, 128], 8),
    ("memory", "moe.num_experts", [2, 64], 1),
    ("wall_clock", "training.steps", [50, 120], 1),
]


def found(path: Path) -> tuple[Any, dict[str, Solved]]:
    return solve(make_study(read_study(path)), AMOUNTS)


def budget(equal: str, key: str, bounds: list[int], multiple: int = 1, tolerance: float = 0.3) -> dict[str, Any]:
    return {"equal": equal, "solve": key, "range": bounds, "multiple_of": multiple, "tolerance": tolerance}


@pytest.mark.thorough
@pytest.mark.parametrize(("equal", "key", "bounds", "multiple"), SOLVED)
def test_no_other_value_comes_nearer(
    study_file: Write, equal: Quantity, key: str, bounds: list[int], multiple: int
) -> None:
    study, solved = found(study_file(budget=budget(equal, key, bounds, multiple)))
    wanted = AMOUNTS.run(study.baseline.config).of(equal)
    assert solved[study.baseline.name].deviation == 0
    for arm in study.arms[1:]:
        best = solved[arm.name]
        assert AMOUNTS.run(arm.config).of(equal) == best.amount == pytest.approx(wanted * (1 + best.deviation))
        for value in range(-(-bounds[0] // multiple) * multiple, bounds[1] + 1, multiple):
            other = AMOUNTS.run(study.with_settings(arm, {key: value}).config).of(equal)
            assert abs(best.amount - wanted) <= abs(other - wanted), (arm.name, value)


def test_every_quantity_is_solved_for() -> None:
    assert {equal for equal, *_ in SOLVED} == set(get_args(Quantity))


def test_every_arm_matches_the_baseline_of_its_stratum(study_file: Write) -> None:
    axes = {
        "design": {"MoE(4/8)": {"chain.iterations": 1}, "CoE-2(4/8)": {"chain.iterations": 2}},
        "depth": {"model.num_layers": [1, 2]},
    }
    changes = {"axes": axes, "skip": None, "baseline": {"design": "MoE(4/8)"}}
    study, solved = found(study_file(**changes, budget=budget("flops", "training.steps", [20, 400])))
    for arm in study.arms:
        wanted = AMOUNTS.run(study.arm(arm.baseline).config).of("flops")
        assert solved[arm.name].amount == pytest.approx(wanted, rel=0.02)
    amounts = {arm.name: solved[arm.name].amount for arm in study.arms if arm.is_baseline}
    assert len(amounts) == 2 and max(amounts.values()) > 1.3 * min(amounts.values())


def test_the_baseline_keeps_its_own_and_the_arms_get_theirs(study_file: Write) -> None:
    study, solved = found(study_file(budget=budget("flops", "training.steps", [20, 400])))
    assert study.baseline.config.training.steps == solved[study.baseline.name].value == 100
    chain = study.arms[1]
    assert chain.config.training.steps == solved[chain.name].value < 100
    assert chain.overrides[-1] == f"training.steps={solved[chain.name].value}"


@pytest.mark.thorough
@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize(
    ("equal", "key", "bounds", "multiple"), [SOLVED[0], SOLVED[1], SOLVED[2], SOLVED[3], SOLVED[4]]
)
def test_amounts_are_those_of_built_models(
    study_file: Write, equal: Quantity, key: str, bounds: list[int], multiple: int
) -> None:
    study, solved = found(study_file(budget=budget(equal, key, bounds, multiple)))
    for arm in study.arms:
        counted, totals = built(arm.config), AMOUNTS.run(arm.config)
        assert counted["parameters"] == totals.of("parameters")
        assert counted["flops"] == pytest.approx(totals.of("flops"), rel=0.01)
        assert counted["expert_compute"] == pytest.approx(totals.of("expert_compute"), rel=0.01)
        assert counted[equal] == pytest.approx(solved[arm.name].amount, rel=0.01)


def built(config: Any) -> dict[str, float]:
    """Of the arm's built model: its parameters, FLOPs of the run, and those of experts as what is gone without them."""
    return {
        "parameters": sum(p.numel() for p in _model(config).parameters()),
        "flops": _flops(config, _model(config)),
        "expert_compute": _flops(config, _model(config), experts_alone=True),
    }


def _model(config: Any) -> torch.nn.Module:
    reset_megatron()
    return build_model(config, config.model.vocab_size)


def _flops(config: Any, model: torch.nn.Module, experts_alone: bool = False) -> float:
    """Of training a whole run: three times a forward pass."""
    shape = RunShape.of(config, config.model.vocab_size).model
    ids = torch.randint(shape.vocab, (2, shape.seq_length))
    with counting(shape) as counter:
        model(ids, torch.arange(shape.seq_length).expand_as(ids), None)
    total = 0
    if experts_alone:
        for name, kinds in counter.get_flop_counts().items():
            if name.endswith((".mlp.experts", ".mlp.shared_experts")):
                total += sum(kinds.values())
    else:
        total = counter.get_total_flops()
    return 3 * total / ids.numel() * AMOUNTS.run(config).tokens


@pytest.mark.parametrize("wanted", [-3, 0, 17, 50, 50.4, 51, 1e6])
@pytest.mark.parametrize("sign", [1, -1])
def test_nearest_of_a_monotone_amount(wanted: float, sign: int) -> None:
    values = range(1, 1000, 7)
    best = nearest(lambda value: sign * value**1.5, values, sign * wanted)
    assert abs(best**1.5 - wanted) == min(abs(value**1.5 - wanted) for value in values)


@pytest.mark.parametrize("wanted", [-3, 0.2, 5, 17.4, 1e6])
def test_nearest_of_few_values_of_an_amount_with_jumps(wanted: float) -> None:
    """Memory may fall where DeepSpeed's buckets fill in another order: all values are tried."""
    values = range(1, 100, 7)

    def amount(value: int) -> float:
        return value**1.5 - 200 * (value > 50)

    best = nearest(amount, values, wanted)
    assert abs(amount(best) - wanted) == min(abs(amount(value) - wanted) for value in values)


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_nearest_of_few_values(count: int) -> None:
    if count == 1:
        with pytest.raises(ValueError, match="the same for every value"):
            nearest(float, range(5, 6), 5)
    else:
        assert nearest(float, range(5, 5 + count), 6) == 6


@pytest.mark.parametrize(
    ("amount", "said"),
    [
        (lambda value: abs(value - 300), "it is not monotone: it shrinks just below"),
        (lambda value: abs(value - 700), "it is not monotone: it grows just below"),
        (lambda value: 4, "it is the same for every value"),
    ],
)
def test_an_amount_that_is_not_monotone_is_refused(amount: Callable[[int], float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        nearest(amount, range(1000), 50)


MISTAKES = [
    (budget("flops", "training.stepz", [1, 9]), "training.stepz is not a setting; did you mean training.steps?"),
    (
        budget("flops", "optimizer.lr", [1, 9]),
        "budget.solve is optimizer.lr: it must name an integer setting",
    ),
    (budget("flops", "model.mla", [1, 9]), "model.mla is 1: it must be a section with the keys kv_lora_rank"),
    (budget("flops", "data.reset_at_documents", [1, 9]), "it must name an integer setting"),
    (budget("flops", "training.log_every", [1, 9]), "flops cannot be solved for training.log_every: it is the same"),
    (budget("flops", "training.steps", [7, 9], 5), "budget.range is [7, 9]: it contains no multiple of 5"),
    (
        budget("flops", "training.steps", [200, 400], 1, 0.1),
        "arm coe-2-2-8_prenorm: no training.steps from 200 to 400 matches the baseline's flops: the nearest is +1",
    ),
    (budget("parameters", "moe.num_experts", [1, 9]), "budget.range includes moe.num_experts 1: shape.topk is 2"),
    (  # within 3 % of the baseline whatever it is, for it changes next to nothing
        budget("memory", "model.vocab_size", [64, 66], 1, 0.03),
        "% of the change over the range, with 64; budget.tolerance is 0.03: widen it or budget.range",
    ),
    (
        budget("flops", "moe.ffn_hidden_size", [2, 63], 1, 0.3),
        "it must be a multiple of 4",
    ),
]


@pytest.mark.parametrize(("given", "said"), MISTAKES)
def test_a_mistake_is_one_line(study_file: Write, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        found(study_file(budget=given))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_seconds_need_a_machine(study_file: Write) -> None:
    study = make_study(read_study(study_file(budget=budget("wall_clock", "training.steps", [20, 400]))))
    with pytest.raises(ConfigError, match="wall_clock requires a machine"):
        solve(study, Amounts())


@pytest.mark.parametrize(
    ("key", "most", "said"),
    [
        (
            "model.num_layers",
            2**31 - 1,
            "budget.range includes model.num_layers 2147483647: model.num_layers is 2147483647",
        ),
        ("chain.iterations", 2**31 - 1, "budget.range includes chain.iterations 2147483647: chain.iterations is"),
    ],
)
def test_a_range_that_no_run_can_have_is_refused_before_it_is_measured(
    study_file: Write, key: str, most: int, said: str
) -> None:
    axes = {"design": {"a": {"moe.topk": 2}, "b": {"moe.topk": 1}}}
    file = study_file(axes=axes, skip=None, baseline={"design": "a"}, budget=budget("flops", key, [1, most]))
    with pytest.raises(ConfigError) as error:
        found(file)
    assert said in str(error.value)
