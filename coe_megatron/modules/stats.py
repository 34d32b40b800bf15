"""Reads what the routers noted during a step: losses and loads by (layer, iteration), over all ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

from coe_megatron.modules.coe_layer import CoELayer
from coe_megatron.modules.router import CoERouter


@dataclass(frozen=True)
class RoutingReport:
    """One router's step, means over the micro-batches of all ranks.

    Attributes:
        layer, iteration: both counted from 1.
        losses: name -> mean of the loss without its coefficient (1.0 for a perfectly balanced auxiliary loss).
        load: the N experts' shares of all token copies; they add up to 1.
    """

    layer: int
    iteration: int
    losses: dict[str, float]
    load: list[float]

    @property
    def imbalance(self) -> float:
        """Load of the busiest expert over the mean load; 1.0 is perfect balance."""
        return max(self.load) * len(self.load)


def routers(model: torch.nn.Module) -> Iterator[tuple[int, int, CoERouter]]:
    """(layer, iteration, router) of every router in the model, both counted from 1."""
    for layer in model.modules():
        if isinstance(layer, CoELayer):
            for t, router in enumerate(layer.routers):
                yield layer.layer_number, t + 1, router


def reset_routing(model: torch.nn.Module) -> None:
    """Forget what the routers have noted; call it before a step whose report is wanted."""
    for _, _, router in routers(model):
        router.stats.reset()


def report_routing(model: torch.nn.Module) -> list[RoutingReport]:
    """What the routers noted since `reset_routing`; a collective over the data-parallel ranks."""
    return [_report(layer, iteration, router) for layer, iteration, router in routers(model)]


def _report(layer: int, iteration: int, router: CoERouter) -> RoutingReport:
    stats, names = router.stats, sorted(router.stats.losses)
    assert stats.load is not None, "no training step since reset_routing"
    calls = stats.load.new_tensor([float(stats.calls)])
    together = torch.cat([*(stats.losses[name].float().view(1) for name in names), calls, stats.load])
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(together, group=group)
    values = together.tolist()
    load, total = values[len(names) + 1 :], sum(values[len(names) + 1 :])
    losses = {name: value / values[len(names)] for name, value in zip(names, values, strict=False)}
    return RoutingReport(layer, iteration, losses, [part / total for part in load])


def update_expert_biases(model: torch.nn.Module) -> None:
    """After an optimizer step: move each expert bias against its expert's load (arXiv 2408.15664), per iteration.

    Does nothing where the expert bias is off. A collective over the data-parallel ranks.
    """
    found = [router for _, _, router in routers(model) if router.enable_expert_bias]
    if not found:
        return
    loads = torch.stack([router.local_tokens_per_expert for router in found])
    biases = torch.stack([router.expert_bias for router in found])
    updated = get_updated_expert_bias(loads, biases, found[0].config.moe_router_bias_update_rate)
    for router, bias in zip(found, updated, strict=True):
        router.local_tokens_per_expert.zero_()
        router.expert_bias.copy_(bias)
