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
    """What the routers noted since `reset_routing`; one collective over the ranks that saw other tokens."""
    found = list(routers(model))
    noted = [_as_vector(router) for _, _, router in found]
    together = torch.cat(noted)
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(together, group=group)
    summed = together.cpu().split([len(vector) for vector in noted])
    return [_report(*router, vector.tolist()) for router, vector in zip(found, summed, strict=True)]


def mean_losses(reports: list[RoutingReport]) -> dict[str, float]:
    """`aux_loss` (balancing losses of any kind) and `z_loss`, means over layers and iterations; what is off is 0."""
    kinds: dict[str, list[float]] = {"aux_loss": [], "z_loss": []}
    for report in reports:
        for name, value in report.losses.items():
            kinds["z_loss" if name == "z_loss" else "aux_loss"].append(value)
    return {name: sum(values) / len(values) if values else 0.0 for name, values in kinds.items()}


def finish_step(model: torch.nn.Module) -> None:
    """What routers need after an optimizer step; a collective where the expert bias is on.

    Each expert bias moves against its expert's load (arXiv 2408.15664), per iteration, and the loads that the global
    auxiliary loss averages over the micro-batches of a step begin anew.
    """
    found = [router for _, _, router in routers(model)]
    for router in found:
        router.reset_global_aux_loss_tracker()
    biased = [router for router in found if router.enable_expert_bias]
    if not biased:
        return
    loads = torch.stack([router.local_tokens_per_expert for router in biased])
    biases = torch.stack([router.expert_bias for router in biased])
    updated = get_updated_expert_bias(loads, biases, biased[0].config.moe_router_bias_update_rate)
    for router, bias in zip(biased, updated, strict=True):
        router.local_tokens_per_expert.zero_()
        router.expert_bias.copy_(bias)


def _as_vector(router: CoERouter) -> torch.Tensor:
    """The losses by name, the number of calls, and the N loads, float64."""
    stats = router.stats
    assert stats.load is not None, "no training step since reset_routing"
    losses = [stats.losses[name].double().view(1) for name in sorted(stats.losses)]
    return torch.cat([*losses, stats.load.new_tensor([stats.calls], dtype=torch.float64), stats.load.double()])


def _report(layer: int, iteration: int, router: CoERouter, summed: list[float]) -> RoutingReport:
    names = sorted(router.stats.losses)
    calls, load = summed[len(names)], summed[len(names) + 1 :]
    losses = {name: value / calls for name, value in zip(names, summed, strict=False)}
    return RoutingReport(layer, iteration, losses, [part / sum(load) for part in load])
