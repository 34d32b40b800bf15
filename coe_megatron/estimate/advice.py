"""Whether a run fits into a device's memory, and if not, the cheapest change of settings that makes it fit."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any, TypeAlias

from coe_megatron.config.checks import problems
from coe_megatron.config.settings import RunConfig
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.run_estimate import RunEstimate, estimate, size
from coe_megatron.estimate.run_shape import RunShape

Changes: TypeAlias = dict[str, Any]  # settings by their dotted names

_UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}


def parse_size(text: str) -> int:
    """Parse a size such as `80GiB` to bytes.

    Raises:
        ConfigError: it is not a size; one line.
    """
    found = re.fullmatch(rf"(\d{{1,9}}(?:\.\d{{1,9}})?)({'|'.join(_UNITS)})", text, re.ASCII)
    count = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if count < 1:
        raise ConfigError(f"{text!r} must be a number above 0 and one of {', '.join(_UNITS)}, such as 80GiB")
    return count


def device_memory_option(text: str) -> int:
    """The bytes of `--device-memory`; raises as `parse_size`, with the option's name."""
    try:
        return parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"--device-memory {error}") from None


def refusal(run: RunShape, cost: RunEstimate, device_memory: int) -> str | None:
    """Why a run does not fit, and which change would make it fit; None if it fits.

    Args:
        cost: the run's estimate.
        device_memory: in bytes.
    """
    if cost.needed <= device_memory:
        return None
    largest = max(cost.memory, key=lambda kind: cost.memory[kind])
    needs = f"a rank needs {size(cost.needed)}, most of it {largest} ({size(cost.memory[largest])})"
    found = cheapest_change(run, device_memory)
    if found is None:
        return f"{needs}; no change that was tried makes it fit"
    changes, needed = found
    listed = " ".join(f"{name}={str(value).lower()}" for name, value in changes.items())
    return f"{needs}; {listed} would fit ({size(needed)})"


def cheapest_change(run: RunShape, device_memory: int) -> tuple[Changes, int] | None:
    """The cheapest change that fits, and the memory per rank with it; tries single changes, then pairs."""
    for changes in _in_order_of_cost(list(_candidates(run.config))):
        changed = _apply(run.config, changes)
        if next(problems(changed, run.layout.world_size), None) is None:
            needed = estimate(run.changed(changed)).needed
            if needed <= device_memory:
                return changes, needed
    return None


def _candidates(config: RunConfig) -> Iterator[Changes]:
    """Single changes in increasing order of cost.

    Recompute mode `experts` repeats no matrix product. ZeRO stages 1 and 2 at most send more gradients, and smaller
    micro-batches make smaller products. `iteration` and `layer` repeat the forward pass of all experts. More expert
    parallelism sends more tokens. Stage 3 sends weights twice per micro-batch, tensor parallelism sends hidden states
    several times per layer, context parallelism keys and values, and a pipeline has a bubble. With optimizer states or
    weights in host memory, the device waits for host and bus.
    """
    zero, parallel, modes = config.zero, config.parallel, ("none", "experts", "iteration", "layer")
    recompute = [{"moe.recompute": mode} for mode in modes[modes.index(config.moe.recompute) + 1 :]]
    yield from (change for change in recompute if change["moe.recompute"] == "experts")
    yield from ({"zero.stage": stage} for stage in (1, 2) if stage > zero.stage)
    yield from ({"training.micro_batch": count} for count in _halves(config.training.micro_batch))
    yield from (change for change in recompute if change["moe.recompute"] != "experts")
    yield from ({"parallel.expert": count} for count in _doubles(parallel.expert, config.moe.num_experts))
    yield from ({"zero.stage": 3} for _ in range(zero.stage < 3))
    yield from ({"parallel.tensor": count} for count in _doubles(parallel.tensor, parallel.ranks_per_node))
    yield from ({"parallel.context": count} for count in _doubles(parallel.context, parallel.ranks_per_node))
    yield from ({"parallel.pipeline": count} for count in _doubles(parallel.pipeline, config.model.num_layers))
    yield from (
        {f"zero.{what}": True} for what in ("offload_optimizer", "offload_parameters") if not getattr(zero, what)
    )


def _in_order_of_cost(single: list[Changes]) -> Iterator[Changes]:
    """Single changes, then pairs in the order of their more expensive change."""
    yield from single
    pairs = sorted(combinations(range(len(single)), 2), key=lambda pair: (pair[1], pair[0]))
    for first, second in pairs:
        if single[first].keys() != single[second].keys():
            yield single[first] | single[second]


def _apply(config: RunConfig, changes: Changes) -> RunConfig:
    for name, value in changes.items():
        section, field = name.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config


def _halves(count: int) -> Iterator[int]:
    while count % 2 == 0:
        count //= 2
        yield count


def _doubles(count: int, most: int) -> Iterator[int]:
    while (count := 2 * count) <= most:
        yield count
