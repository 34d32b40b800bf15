"""Loss at equal memory: an arm against its baseline at the size that has the arm's memory.

The sizes are the arms of the study with the baseline's settings except those that change its size. Those that another
one beats in both memory and mean loss do not count. The loss between two sizes is interpolated for each seed, linearly
in the logarithm of the measured peak memory, and not extrapolated.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

from coe_megatron.config import RunConfig
from coe_megatron.study.plan.cost_table import ArmPlan
from coe_megatron.study.report.comparison import Comparison, Summary, corrected
from coe_megatron.study.report.results import Result
from coe_megatron.study.report.speedup import Factor, Points, Reached, factor, reached

# Settings in which the sizes of a baseline may differ; choices per token are not among them, since they cost no memory.
_SIZES = (
    "model.num_layers", "model.hidden_size", "model.num_attention_heads", "model.ffn_hidden_size", "model.mla",
    "moe.num_experts", "moe.ffn_hidden_size", "optimizer.lr",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A size of the baseline.

    Attributes:
        memory: largest measured peak of its runs in bytes.
        losses: final loss by seed.
    """

    name: str
    memory: float
    losses: Mapping[int, float]


@dataclass(frozen=True)
class EqualMemory:
    """An arm at equal memory.

    Attributes:
        memory: largest measured peak of the arm's runs in bytes.
        sizes: the sizes that count, by rising memory and falling mean loss.
        comparison: gain over the baseline at the arm's memory; None if the arm's memory is not between those of two
            sizes, or without a common seed.
        factor: memory with which the baseline reaches the arm's loss, over the arm's memory.
    """

    memory: float
    sizes: Sequence[Size]
    comparison: Comparison | None
    factor: Factor | None


def equal_memory(
    summaries: Sequence[Summary], memory: Mapping[str, float], solved: Iterable[str], margin: float | None
) -> dict[str, EqualMemory]:
    """Compare all arms that are not a size of their baseline; by name.

    Args:
        memory: measured peak in bytes by arm, of arms with finished runs.
        solved: further settings in which the sizes may differ, such as the one that a budget solves for.
    """
    ignored = (*_SIZES, *solved)
    by_name = {summary.arm.arm.name: summary for summary in summaries}
    found = {}
    for name, summary in by_name.items():
        own = _family(by_name[summary.arm.arm.baseline].arm, ignored)
        family = [each for each in summaries if _family(each.arm, ignored) == own and each.losses]
        if summary in family or name not in memory or not family:
            continue
        sizes = front([Size(each.arm.arm.name, memory[each.arm.arm.name], each.losses) for each in family])
        found[name] = _compared(memory[name], summary.losses, sizes, margin)
    tested = corrected({name: each.comparison for name, each in found.items() if each.comparison})
    return {name: EqualMemory(each.memory, each.sizes, tested.get(name), each.factor) for name, each in found.items()}


def front(sizes: Sequence[Size]) -> list[Size]:
    """The sizes that no other one beats in both memory and mean loss, by rising memory."""
    found: list[Size] = []
    for size in sorted(sizes, key=lambda each: (each.memory, mean(each.losses.values()))):
        if not found or mean(size.losses.values()) < mean(found[-1].losses.values()):
            found.append(size)
    return found


def loss_at(memory: float, sizes: Sequence[Size]) -> dict[int, float]:
    """The loss at an amount of memory, by seed that both neighbouring sizes have; empty outside of the sizes."""
    for below, above in pairwise(sizes):
        if below.memory <= memory <= above.memory:
            share = math.log(memory / below.memory) / math.log(above.memory / below.memory)
            common = below.losses.keys() & above.losses.keys()
            return {seed: (1 - share) * below.losses[seed] + share * above.losses[seed] for seed in sorted(common)}
    return next((dict(size.losses) for size in sizes if size.memory == memory), {})


def _compared(memory: float, losses: Mapping[int, float], sizes: Sequence[Size], margin: float | None) -> EqualMemory:
    base = loss_at(memory, sizes)
    gains = {seed: base[seed] - loss for seed, loss in losses.items() if seed in base}
    return EqualMemory(
        memory, sizes, Comparison(gains, margin) if gains else None, _memory_factor(memory, losses, sizes)
    )


def _memory_factor(memory: float, losses: Mapping[int, float], sizes: Sequence[Size]) -> Factor | None:
    ratios = []
    for seed, loss in losses.items():
        points: Points = [(size.memory, size.losses[seed]) for size in sizes if seed in size.losses]
        if points:
            place = reached(points, loss)
            ratios.append(Reached(place.amount / memory, place.bound))
    return factor(ratios) if ratios else None


def _family(arm: ArmPlan, ignored: Sequence[str]) -> dict[str, Any]:
    """The settings of an arm without those that its sizes may differ in."""
    return _without(arm.arm.config, [*ignored, "output", "training.seed"])


def _without(config: RunConfig, keys: Iterable[str]) -> dict[str, Any]:
    values = asdict(config)
    for key in keys:
        *path, last = key.split(".")
        inner = values
        for name in path:
            inner = inner.get(name) or {}
        inner.pop(last, None)
    return values


def peak_memory(results: Sequence[Result]) -> dict[str, float]:
    """The largest measured peak of an arm's finished runs in bytes, by arm."""
    found: dict[str, float] = {}
    for result in results:
        if result.finished:
            found[result.run.arm] = max(found.get(result.run.arm, 0), result.memory)
    return found
