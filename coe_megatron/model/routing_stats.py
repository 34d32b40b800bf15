"""Reports of what routers and chain probes recorded during a step, by (layer, iteration), over all ranks."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from coe_megatron.model.chain_probe import ChainProbe
from coe_megatron.model.layer import CoELayer, coe_layers
from coe_megatron.model.router import CoERouter
from coe_megatron.model.router_stats import RouterStats


@dataclass(frozen=True)
class RoutingReport:
    """One iteration of one layer in a step, over the micro-batches of all ranks; padding counts in nothing.

    With `fixed` gating every iteration has a report, since its experts serve the tokens again: with the numbers of the
    one routing there is, and losses in iteration 1 only.

    Attributes:
        layer, iteration: both counted from 1.
        losses: name -> mean over micro-batches of the loss without its coefficient (1.0 for a perfectly balanced
            auxiliary loss); with `moe.auxiliary_mean: step` weighted as in the gradient.
        load: the N experts' shares of all token copies; they add up to 1.
        load_max_over_mean: load of the busiest expert over the mean load; 1.0 is perfect balance.
        dead_experts: how many experts got no copy.
        entropy: mean over tokens of the entropy in nats of the router's distribution; log(N) where it is uniform.
        dropped: share of all K copies of the tokens that an expert's capacity turned away.
        overlap: share of the copies that went to an expert where their token had been in an earlier iteration; None in
            iteration 1. A token sees K (1 - overlap) new experts.
        state_norm: root mean square over tokens and hidden dimensions of x(t), the state that the iteration leaves.
        increment_norm: the same of F_t, what the experts made, times its gain where `chain` has one.
        increment_over_state: increment_norm over the same of x(t-1), the state that the iteration received.
        increment_cosines: mean over tokens of cos(F_s, F_t), for s = 1 .. t-1; None in iteration 1.
        single_scale: R² of the best fit Δ_t = s F_1 with one number s for all tokens of the step, where Δ_t is what the
            first t iterations add to their input: 1 if they do no more than scale F_1; None in iteration 1.
        pairs: N lists of N: how many tokens reached expert i in the iteration before and expert j in this one; None in
            iteration 1, and where they were not asked for.
    """

    layer: int
    iteration: int
    losses: dict[str, float]
    load: list[float]
    load_max_over_mean: float
    dead_experts: int
    entropy: float
    dropped: float
    overlap: float | None
    state_norm: float
    increment_norm: float
    increment_over_state: float
    increment_cosines: list[float] | None = None
    single_scale: float | None = None
    pairs: list[list[int]] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For metrics.jsonl; without pairs where there are none."""
        values = asdict(self)
        return values if self.pairs is not None else {name: values[name] for name in values if name != "pairs"}


def reset_routing(model: torch.nn.Module, detailed: bool = False, pairs: bool = False) -> None:
    """Forget what was recorded; call it before each step.

    Args:
        detailed: a report of the step is wanted, which takes time.
        pairs: with pairs of experts in it, which are N x N numbers for each iteration after the first.
    """
    for layer in coe_layers(model):
        experts = layer.config.num_moe_experts if pairs else None
        layer.probe = ChainProbe(layer.chain.iterations, experts) if detailed else None
        for router in layer.routers:
            router.stats = RouterStats(detailed=detailed)


def report_routing(model: torch.nn.Module) -> list[RoutingReport]:
    """What was recorded in a detailed step, by layer and iteration, of all layers on all ranks; collective."""
    stages = parallel_state.get_pipeline_model_parallel_group()
    reports: list[list[RoutingReport]] = [[]] * stages.size()
    torch.distributed.all_gather_object(reports, _report_stage(model), group=stages)
    return sorted((report for stage in reports for report in stage), key=lambda report: report.layer)


def _report_stage(model: torch.nn.Module) -> list[RoutingReport]:
    """The reports of this stage's layers; one collective over the ranks that saw other tokens."""
    found = [(layer, t) for layer in coe_layers(model) for t in range(layer.chain.iterations)]
    if not found:
        return []
    recorded = [_as_vector(layer, t) for layer, t in found]
    together = torch.cat(recorded)
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(together, group=group)
    summed = together.cpu().split([len(vector) for vector in recorded])
    return [_report(*place, vector.tolist()) for place, vector in zip(found, summed, strict=True)]


def summary(reports: list[RoutingReport]) -> dict[str, float]:
    """Means over layers and iterations: `aux_loss` (balancing losses of any kind), `z_loss` and `routing_...`.

    A loss that is off is 0; `routing_overlap` is left out where there is one iteration.
    """
    found: dict[str, list[float]] = {"aux_loss": [], "z_loss": []}
    for report in reports:
        for name, value in report.losses.items():
            found["z_loss" if name == "z_loss" else "aux_loss"].append(value)
    for name in ("entropy", "load_max_over_mean", "dead_experts", "dropped", "overlap"):
        values = [getattr(report, name) for report in reports]
        found[f"routing_{name}"] = [value for value in values if value is not None]
    return {name: _ratio(sum(values), len(values)) for name, values in found.items() if values or "loss" in name}


def _router(layer: CoELayer, t: int) -> CoERouter:
    """The router of iteration t (from 0), whose choice `fixed` gating uses again."""
    return layer.routers[min(t, len(layer.routers) - 1)]


def _as_vector(layer: CoELayer, t: int) -> torch.Tensor:
    """The losses by name, the number of calls, the entropy, what the probe has, the N loads, and the pairs; float64."""
    stats = _router(layer, t).stats
    assert layer.probe is not None and stats.load is not None, "no detailed training step since reset_routing"
    recorded = [*(stats.losses[name] for name in sorted(stats.losses)), stats.calls, stats.entropy]
    scalars = [
        value.to(stats.load).view(1) if isinstance(value, torch.Tensor) else stats.load.new_full((1,), value)
        for value in recorded
    ]
    pairs = () if layer.probe.pairs is None or t == 0 else (layer.probe.pairs[t].flatten(),)
    return torch.cat([*scalars, layer.probe.sums[t], layer.probe.cosines[t, :t], stats.load, *pairs])


def _report(layer: CoELayer, t: int, summed: list[float]) -> RoutingReport:
    router = _router(layer, t)
    names = sorted(router.stats.losses)
    losses, (calls, entropy, *rest) = summed[: len(names)], summed[len(names) :]
    (tokens, copies, repeated, before, increment, after, first, delta, product), rest = rest[:9], rest[9:]
    cosines, rest, experts = rest[:t], rest[t:], layer.config.num_moe_experts
    load, pairs = rest[:experts], [int(count) for count in rest[experts:]]
    charged = t < len(layer.routers)
    values = tokens * layer.config.hidden_size
    return RoutingReport(
        layer.layer_number,
        t + 1,
        losses={name: loss / calls for name, loss in zip(names, losses, strict=True)} if charged else {},
        load=[_ratio(part, sum(load)) for part in load],
        load_max_over_mean=_ratio(max(load) * len(load), sum(load)),
        dead_experts=load.count(0.0),
        entropy=_ratio(entropy, tokens),
        dropped=_ratio(router.topk * tokens - copies, router.topk * tokens),
        overlap=_ratio(repeated, copies) if t else None,
        state_norm=math.sqrt(_ratio(after, values)),
        increment_norm=math.sqrt(_ratio(increment, values)),
        increment_over_state=math.sqrt(_ratio(increment, before)),
        increment_cosines=[_ratio(cosine, tokens) for cosine in cosines] or None,
        single_scale=_ratio(product**2, first * delta) if t else None,
        pairs=[pairs[row : row + experts] for row in range(0, len(pairs), experts)] or None,
    )


def _ratio(part: float, whole: float) -> float:
    """0 where there is nothing to take a share of."""
    return part / whole if whole else 0.0
