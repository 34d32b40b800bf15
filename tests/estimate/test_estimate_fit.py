"""`--device-memory`: sizes, refusals, and the change that is named."""

from pathlib import Path

import pytest

from coe_megatron.config import RunConfig, load
from coe_megatron.config.checks import problems
from coe_megatron.estimate.advice import cheapest_change, parse_size, refusal
from coe_megatron.estimate.run_estimate import estimate
from coe_megatron.estimate.run_shape import RunShape

CONFIGS = Path(__file__).parents[2] / "configs"
VOCABULARY = 102_400


def large(*overrides: str) -> RunConfig:
    own = ["parallel.world_size=4096", "training.micro_batch=1", "zero.stage=1", "moe.recompute=experts"]
    own += ["moe.dispatcher=alltoall", "moe.overlap_chunks=1", "data.path=nowhere"]
    return load(CONFIGS / "1024-gpus.yaml", [*own, *overrides])


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("1.5MiB", 3 * 2**19)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["80", "GiB", "80 GiB", "80gib", "-1GiB", "0GiB", "1e3GB", "\u0663GiB", "80GiB\n", "9" * 400 + "GB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a number above 0 and one of GiB, GB, MiB, MB"):
        parse_size(text)


def test_what_fits_is_not_refused() -> None:
    run = RunShape.of(large(), VOCABULARY)
    cost = estimate(run)
    assert refusal(run, cost, cost.needed) is None
    assert refusal(run, cost, cost.needed - 1) is not None


@pytest.mark.parametrize(
    ("gib", "overrides", "changes"),
    [
        (48, ["moe.recompute=none"], {"moe.recompute": "experts"}),
        (35, ["moe.recompute=none"], {"zero.stage": 2}),
        (40, ["parallel.world_size=1024", "training.micro_batch=2", "zero.stage=2"], {"training.micro_batch": 1}),
        (19, ["zero.stage=2"], {"moe.recompute": "iteration"}),
        (36, ["parallel.ranks_per_node=4", "zero.stage=1", "moe.recompute=layer"], {"zero.stage": 2}),
        (14, [], {"moe.recompute": "iteration", "zero.stage": 3}),
    ],
)
def test_the_cheapest_change_that_fits_is_named(gib: int, overrides: list[str], changes: dict[str, object]) -> None:
    found = cheapest_change(RunShape.of(large(*overrides), VOCABULARY), gib * 2**30)
    assert found is not None and found[0] == changes and found[1] <= gib * 2**30
    named = [f"{name}={value}" for name, value in changes.items()]
    changed = large(*overrides, *named)
    assert not list(problems(changed))
    assert estimate(RunShape.of(changed, VOCABULARY)).needed == found[1]


def test_more_ranks_are_no_change_and_nothing_may_fit() -> None:
    config = load(CONFIGS / "olmoe-1b-7b.yaml", ["data.path=nowhere", "parallel.world_size=1", "parallel.expert=1"])
    run = RunShape.of(config, 50_304)
    told = refusal(run, estimate(run), 2**30)
    assert told is not None and told.endswith("no change that was tried makes it fit")
    assert "most of it optimizer" in told or "most of it activations" in told
