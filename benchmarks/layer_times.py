"""Times one MoE sub-layer, forward and backward: Megatron's own, ours with C = 1, and CoE-2 with half the experts.

The three alternate, so that other load on the machine affects all of them equally; ratios of minima and of medians are
reported. One process; on CUDA each step is synchronised.

A shape is a `ModelShape` of one layer whose sequence is the batch: T = `seq_length` tokens.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import megatron.core
import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.config.settings import ParallelSettings
from coe_megatron.distributed import process_groups
from coe_megatron.estimate.closed_forms import ModelShape, forward_flops
from coe_megatron.local_backend.megatron_compat import build_moe_layer
from coe_megatron.model import CoELayer, coe_layer_spec
from coe_megatron.text import aligned

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Stock = Literal["local", "transformer_engine"]  # Megatron's spec
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# Largest difference of outputs due to rounding, relative to the largest output.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
_WARM_UP = 2


class LayersDifferError(RuntimeError):
    """Our layer computes another output than Megatron's, so their times cannot be compared."""


@dataclass(frozen=True)
class Seconds:
    """Seconds of one forward and backward pass."""

    minimum: float
    median: float

    @classmethod
    def of(cls, steps: list[float]) -> "Seconds":
        return cls(min(steps), statistics.median(steps))

    def over(self, other: "Seconds") -> "Seconds":
        """Ratios of minima and of medians."""
        return Seconds(self.minimum / other.minimum, self.median / other.median)


@dataclass(frozen=True)
class LayerTimes:
    """The measured times for one shape.

    Attributes:
        stock: Megatron's layer; its experts run sequentially with the local spec, grouped with Transformer Engine.
        ours: CoELayer with C = 1 and the same weights.
        coe: CoELayer with C = 2 and K / 2 experts per token and iteration.
        difference: of the outputs of stock and ours, relative to the largest one.
    """

    shape: ModelShape
    stock: Seconds
    ours: Seconds
    coe: Seconds
    difference: float

    @property
    def speed_up(self) -> Seconds:
        """Stock over ours: above 1, ours is faster."""
        return self.stock.over(self.ours)

    @property
    def flops_ratio(self) -> float:
        """CoE over MoE, by the closed form: above 1, since router and shared experts run twice."""
        return _layer_flops(halved_chain(self.shape)) / _layer_flops(self.shape)

    @property
    def time_ratio(self) -> Seconds:
        """CoE over MoE, both ours."""
        return self.coe.over(self.ours)

    @property
    def time_over_flops(self) -> Seconds:
        """Time ratio over FLOPs ratio: 1 if the chain's time is proportional to its FLOPs."""
        ratio, flops = self.time_ratio, self.flops_ratio
        return Seconds(ratio.minimum / flops, ratio.median / flops)

    def as_dict(self) -> dict:
        """Everything measured and derived, for JSON."""
        shape = {name: getattr(self.shape, name) for name in ("hidden", "expert_ffn", "shared_ffn", "experts", "topk")}
        return {
            "shape": {**shape, "tokens": self.shape.seq_length},
            "seconds": {name: asdict(getattr(self, name)) for name in ("stock", "ours", "coe")},
            "outputs_difference": self.difference,
            "speed_up": asdict(self.speed_up),
            "flops_ratio": self.flops_ratio,
            "time_ratio": asdict(self.time_ratio),
            "time_over_flops": asdict(self.time_over_flops),
        }


def halved_chain(shape: ModelShape) -> ModelShape:
    """CoE-2(K/2) for MoE(K), K even."""
    assert shape.topk % 2 == 0
    return replace(shape, topk=shape.topk // 2, chain=ChainSettings(iterations=2))


def benchmark_layers(
    shapes: list[ModelShape],
    *,
    repeats: int,
    dtype: torch.dtype = torch.float32,
    clock: str = "wall",
    on_round: Callable[[int, ModelShape | None], None] = lambda rounds, finished: None,
) -> list[LayerTimes]:
    """Create process groups, time each shape (on CUDA if available, otherwise on the CPU), and destroy the groups.

    Args:
        clock: `wall`, or `cpu` for the CPU time of this process, which is less sensitive to other load (and
            does not measure a CUDA device).
        on_round: called after each round with the rounds done in all and, after its last round, the shape.

    Raises:
        LayersDifferError: our layer's output is not that of Megatron's.
    """
    device = process_groups.start(ParallelSettings(), seed=1234, env=process_groups.DistributedEnv())
    try:
        results = []
        for index, shape in enumerate(shapes):

            def after(rounds: int, index: int = index, shape: ModelShape = shape) -> None:
                on_round(index * repeats + rounds, shape if rounds == repeats else None)

            results.append(time_layers(shape, repeats, dtype, device, clock, after))
        return results
    finally:
        process_groups.stop()


def time_layers(
    shape: ModelShape,
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
    clock: str = "wall",
    on_round: Callable[[int], None] = lambda rounds: None,
    spec: Stock = "local",
) -> LayerTimes:
    """Build the three layers of one shape, compare outputs, and time them alternately; Megatron's groups must exist.

    Args:
        spec: whose parts all three layers have. Not yet run with Transformer Engine.
    """
    stock, ours, coe = (
        _stock(shape, dtype, spec),
        _ours(shape, dtype, spec),
        _ours(halved_chain(shape), dtype, spec),
    )
    _copy_weights(stock, ours)
    hidden = torch.randn(shape.seq_length, 1, shape.hidden, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn_like(hidden)
    difference = _require_equal(stock, ours, hidden)
    layers = {"stock": stock, "ours": ours, "coe": coe}
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for round_ in range(-_WARM_UP, repeats):
        for name, layer in layers.items():
            step = _step_seconds(layer, hidden, gradient, CLOCKS[clock])
            if round_ >= 0:
                seconds[name].append(step)
        if round_ >= 0:
            on_round(round_ + 1)
    return LayerTimes(shape, **{name: Seconds.of(steps) for name, steps in seconds.items()}, difference=difference)


def machine() -> dict[str, str | int]:
    """The hardware and software that the results depend on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
    }


def table(results: list[LayerTimes]) -> str:
    """A line per shape; ratios of minima, then after a slash of medians."""
    head = ["d", "ffn", "N", "K", "T", "stock", "ours", "CoE-2(K/2)", "speed-up", "CoE/MoE", "FLOPs", "time/FLOPs"]
    return "\n".join(aligned([head, *map(_cells, results)], ">"))


def _cells(result: LayerTimes) -> list[str]:
    shape = result.shape
    stock, ours, coe = (f"{1e3 * timed.minimum:.1f} ms" for timed in (result.stock, result.ours, result.coe))
    speed_up, ratio, excess = (
        f"{pair.minimum:.2f}/{pair.median:.2f}" for pair in (result.speed_up, result.time_ratio, result.time_over_flops)
    )
    sizes = (shape.hidden, shape.expert_ffn, shape.experts, shape.topk, shape.seq_length)
    return [*map(str, sizes), stock, ours, coe, speed_up, ratio, f"{result.flops_ratio:.3f}", excess]


def _layer_flops(shape: ModelShape) -> int:
    flops = forward_flops(shape)
    return flops.routers + flops.experts + flops.shared


def _config(shape: ModelShape, dtype: torch.dtype, spec: Stock) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.expert_ffn,
        moe_ffn_hidden_size=shape.expert_ffn,
        moe_shared_expert_intermediate_size=shape.shared_ffn or None,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.topk,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        add_bias_linear=False,
        params_dtype=dtype,
        moe_grouped_gemm=spec == "transformer_engine",
    )


def _stock(shape: ModelShape, dtype: torch.dtype, spec: Stock) -> MoELayer:
    config = _config(shape, dtype, spec)
    if spec == "local":
        return _build(get_gpt_layer_local_spec(num_experts=shape.experts, normalization="RMSNorm"), config)
    grouped = get_gpt_layer_with_transformer_engine_spec(num_experts=shape.experts, moe_grouped_gemm=True)
    return _build(grouped, config)


def _ours(shape: ModelShape, dtype: torch.dtype, spec: Stock) -> CoELayer:
    config = _config(shape, dtype, spec)
    return _build(coe_layer_spec(config, shape.chain, use_transformer_engine=spec == "transformer_engine"), config)


def _build(spec: ModuleSpec, config: TransformerConfig) -> MoELayer:
    layer = build_moe_layer(spec.submodules.mlp, config, get_default_pg_collection()).to(torch.cuda.current_device())
    layer.set_layer_number(1)
    return layer


@torch.no_grad()
def _copy_weights(stock: MoELayer, ours: CoELayer) -> None:
    """With the local spec Megatron's experts are modules of their own; with Transformer Engine both have the same."""
    for name, weight in ours.named_parameters():
        linear = {"experts.weight1": "linear_fc1", "experts.weight2": "linear_fc2"}.get(name)
        if linear is None:
            weight.copy_(stock.get_parameter(name))
        else:
            experts = stock.experts.local_experts
            weight.copy_(torch.stack([getattr(expert, linear).weight for expert in experts]))


@torch.no_grad()
def _require_equal(stock: MoELayer, ours: CoELayer, hidden: torch.Tensor) -> float:
    expected, found = stock(hidden)[0].float(), ours(hidden)[0].float()
    difference = float((expected - found).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE[hidden.dtype]:
        raise LayersDifferError(f"outputs of Megatron's layer and ours differ by {difference:.1e} of the largest one")
    return difference


def _step_seconds(layer: MoELayer, hidden: torch.Tensor, gradient: torch.Tensor, clock: Callable[[], float]) -> float:
    layer.zero_grad(set_to_none=True)
    hidden.grad = None
    _wait(hidden)
    start = clock()
    layer(hidden)[0].backward(gradient)
    _wait(hidden)
    return clock() - start


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
