"""The configs of published models and of large layouts: published counts, and comments that say what --dry-run says."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from coe_megatron.config import RunConfig, load
from coe_megatron.estimate.run_estimate import RunEstimate, estimate, vocabulary
from coe_megatron.estimate.run_shape import RunShape

CONFIGS = Path(__file__).parents[2] / "configs"
MOE = "chain.iterations=1"
PEAK, REACHED = 989e12, 0.3  # FLOP/s of an H100 in bf16, and the share the comments assume
HOURS_OF_A_GPU = 16_384 * 54 * 24 / 419  # between two interruptions of Llama 3 405B


def costed(name: str, *overrides: str) -> tuple[RunConfig, RunEstimate]:
    config = load(CONFIGS / f"{name}.yaml", [*overrides, "data.path=nowhere"])
    return config, estimate(RunShape.of(config, vocabulary(config), config.parallel.world_size or 1))


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
    lines = (CONFIGS / f"{request.param}.yaml").read_text().splitlines()
    comments = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    return Said(*costed(request.param), comments)


def gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def test_comments_say_what_a_rank_holds(said: Said) -> None:
    parts = {name: count for name, count in said.cost.memory.items() if count}
    listed = ", ".join(f"{name} {gib(count)}" for name, count in parts.items())
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
    seconds = said.cost.flops_per_token.total * said.cost.tokens_per_step / (ranks * PEAK * REACHED)
    assert f"a step would take {seconds:.2f} s and the run {seconds * training.steps / 3600:.0f} h" in said.text
    assert f"one failure in {HOURS_OF_A_GPU / ranks:.0f} h" in said.text
    assert f"each {training.save_every:,} steps" in said.text


@pytest.mark.parametrize(
    ("name", "overrides", "pattern"),
    [
        ("64-gpus", ["training.micro_batch=4"], r"; 4 would hold ([\d.]+) GiB"),
        ("1024-gpus", ["training.micro_batch=2", "moe.recompute=layer"], r"at micro-batch 2 would hold ([\d.]+) GiB"),
    ],
)
def test_comments_say_what_another_choice_would_hold(name: str, overrides: list[str], pattern: str) -> None:
    text = " ".join(line.lstrip("# ") for line in (CONFIGS / f"{name}.yaml").read_text().splitlines())
    found = re.search(pattern, text)
    _, other = costed(name, *overrides)
    assert found and found[1] == gib(sum(other.memory.values()))
    if name == "1024-gpus":
        assert f"{other.extra_flops['layer'] / other.flops_per_token.total:.0%}".replace("%", " %") in text
