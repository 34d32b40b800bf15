"""The configs of published models and of large layouts: published counts, and comments that say what --dry-run says."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from coe_megatron.config import RunConfig, load
from coe_megatron.estimate.machine import machine
from coe_megatron.estimate.run_estimate import RunEstimate, estimate, vocabulary
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.scale.search import MARGIN, Search

CONFIGS = Path(__file__).parents[2] / "configs"
MOE = "chain.iterations=1"
HOURS_OF_A_GPU = 16_384 * 54 * 24 / 419  # between two interruptions of Llama 3 405B


def costed(name: str, *overrides: str) -> tuple[RunConfig, RunEstimate]:
    config = load(CONFIGS / f"{name}.yaml", [*overrides, "data.path=nowhere"])
    run = RunShape.of(config, vocabulary(config), config.parallel.world_size or 1)
    return config, estimate(run, machine=machine("h100"))


@pytest.mark.parametrize(
    ("name", "own_topk", "total", "active"),
    [("olmoe-1b-7b", 8, 6.92e9, 1.28e9), ("deepseek-v2-lite", 6, 15.7e9, 2.45e9)],
)
def test_parameters_are_the_published_ones(name: str, own_topk: int, total: float, active: float) -> None:
    """DeepSeek counts the embedding, which is a look-up, to all parameters and not to the active ones."""
    _, model = costed(name, MOE, f"moe.topk={own_topk}")
    counted = model.parameters
    used = counted.active - (counted.embedding if name == "deepseek-v2-lite" else 0)
    assert counted.total == pytest.approx(total, rel=0.001) and used == pytest.approx(active, rel=0.005)

    config, chain = costed(name)
    assert chain.flops_per_token.experts == model.flops_per_token.experts
    assert config.chain.iterations * config.moe.topk == own_topk
    assert chain.parameters.total - counted.total == counted.routers  # one router more in each layer


@dataclass
class Said:
    """A layout's config with its comments as one text."""

    config: RunConfig
    cost: RunEstimate
    text: str


@pytest.fixture(scope="module", params=["64-gpus", "1024-gpus"])
def said(request: pytest.FixtureRequest) -> Said:
    return Said(*costed(request.param), comments(request.param))


def comments(name: str) -> str:
    """All comments of a config as one text."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def test_comments_say_what_a_rank_holds(said: Said) -> None:
    parts = {name: count for name, count in said.cost.memory.items() if count}
    listed = ", ".join(f"{name.replace('_', ' ')} {gib(count)}" for name, count in parts.items())
    assert f"Memory: {gib(sum(parts.values()))} GiB a rank: {listed}." in said.text
    modes = ", ".join(f"{mode} {gib(each.peak)}" for mode, each in said.cost.activations.items())
    assert f"Activations by recompute mode: {modes} GiB" in said.text
    assert sum(parts.values()) < 60 * 2**30, "of 80 GB something must be left for uneven routing"


def test_comments_say_what_a_rank_sends(said: Said) -> None:
    sent = said.cost.communication
    total = sum(kind.total for kind in sent.values())
    assert f"Network: {gib(total)} GiB a rank and step: all-to-all {gib(sent['all_to_all'].inside_node)} " in said.text
    assert sent["all_to_all"].across_nodes == 0, "it stays inside a node"
    across = {kind: gib(sent[kind].across_nodes) for kind in ("gradients", "weights")}
    assert f"gradients {across['gradients']} and weights {across['weights']} between nodes" in said.text


def test_comments_say_how_large_and_long_it_is(said: Said) -> None:
    training, ranks = said.config.training, said.config.parallel.world_size
    assert ranks is not None and f"{said.cost.tokens_per_step:,} tokens a step" in said.text
    assert f"{training.steps:,} steps are" in said.text
    assert round(said.config.optimizer.warmup * training.steps) == pytest.approx(2000, abs=2)
    micro_batches = training.global_batch // (training.micro_batch * ranks)
    assert f"Micro-batch {training.micro_batch}, {micro_batches} of them a step" in said.text
    assert said.cost.time is not None and said.cost.mfu is not None
    seconds, run = said.cost.time.total, said.cost.time.total * training.steps / 3600
    assert (
        f"a step would take {seconds:.2f} s, {100 * said.cost.mfu:.0f} % of the peak, and the run {run:.0f} h"
        in said.text
    )
    assert f"one failure in {HOURS_OF_A_GPU / ranks:.0f} h" in said.text
    assert f"each {training.save_every:,} steps" in said.text


@pytest.mark.parametrize(
    ("name", "overrides", "pattern"),
    [
        ("64-gpus", ["training.micro_batch=2"], r"; 2 would hold ([\d.]+) GiB"),
        ("1024-gpus", ["moe.recompute=layer"], r"at micro-batch 2 would hold ([\d.]+) GiB"),
    ],
)
def test_comments_say_what_another_choice_would_hold(name: str, overrides: list[str], pattern: str) -> None:
    found = re.search(pattern, comments(name))
    _, other = costed(name, *overrides)
    assert found and found[1] == gib(sum(other.memory.values()))
    if name == "1024-gpus":
        assert f"{other.extra_flops['layer'] / other.flops_per_token.total:.0%}".replace("%", " %") in comments(name)


@pytest.mark.parametrize(
    ("name", "override", "pattern"),
    [
        ("64-gpus", "parallel.expert=64", r"EP 64 would take ([\d.]+) s a step"),
        ("64-gpus", "zero.stage=1", r"would wait for gradients and weights, ([\d.]+) s"),
        ("64-gpus", "training.micro_batch=2", r"GiB and take ([\d.]+) s"),
        ("1024-gpus", "parallel.expert=16", r"EP 16 would take ([\d.]+) s a step"),
        ("1024-gpus", "parallel.expert=64", r"EP 64 ([\d.]+) s"),
        ("1024-gpus", "zero.stage=2", r"wait for the weights \(([\d.]+) s\)"),
        ("1024-gpus", "zero.stage=1", r"in bf16 for both \(([\d.]+) s\)"),
        ("1024-gpus", "parallel.tensor=2", r"parallelism of 2 would take ([\d.]+) s"),
        ("1024-gpus", "training.micro_batch=1", r"twice as often \(([\d.]+) s\)"),
    ],
)
def test_comments_say_how_long_another_choice_would_take(name: str, override: str, pattern: str) -> None:
    found = re.search(pattern, comments(name))
    _, other = costed(name, override)
    assert found and other.time is not None and found[1] == f"{other.time.total:.2f}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["64-gpus", "1024-gpus"])
def test_they_are_next_to_the_fastest_that_the_search_finds(name: str) -> None:
    config, cost = costed(name)
    run = RunShape.of(config, vocabulary(config), config.parallel.world_size or 1)
    h100 = machine("h100")
    assert h100.memory.capacity is not None and cost.time is not None
    best = Search(run, h100, MARGIN * h100.memory.capacity).best(1).best[0]
    assert best.time.total <= cost.time.total <= 1.01 * best.time.total
