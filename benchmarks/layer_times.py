"""Times one MoE sub-layer, forward and backward: Megatron's own, ours with C = 1, and CoE-2 with half the experts, by
our layer and by the plain loops of `coe_megatron.chain.method`.

All alternate, also those of several dtypes, so that other load on the machine affects all of them equally; ratios of
minima and of medians are reported. One process; on CUDA each step is synchronised.

A shape is a `ModelShape` of one layer whose sequence is the batch: T = `seq_length` tokens.
"""

import statistics
import time
from collections.abc import Callable, Sequence
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

from coe_megatron.chain.method import ChainOfExperts, RouterSettings
from coe_megatron.chain.settings import ChainSettings
from coe_megatron.config.settings import ParallelSettings
from coe_megatron.distributed import process_groups
from coe_megatron.estimate.closed_forms import ModelShape, forward_flops
from coe_megatron.local_backend.megatron_compat import build_moe_layer
from coe_megatron.model import CoELayer, coe_layer_spec
from coe_megatron.text import aligned

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Stock = Literal["local", "transformer_engine"]  # Megatron's spec
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# Largest difference of outputs due to rounding, relative to the largest output.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
_WARM_UP = 2
_AUX_LOSS = 0.01
_SIZES = ("d", "ffn", "N", "K", "T")  # columns
LAYERS = ("stock", "ours", "coe", "loops")  # of LayerTimes


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

    def __str__(self) -> str:
        return f"{self.minimum:.2f}/{self.median:.2f}"

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
        loops: the same chain as its definition computes it, expert by expert, with the norm; in fp32, else None.
        difference: of the outputs of stock and ours, relative to the largest one.
    """

    shape: ModelShape
    dtype: torch.dtype
    stock: Seconds
    ours: Seconds
    coe: Seconds
    loops: Seconds | None
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
            "dtype": NAMES[self.dtype],
            "seconds": {name: asdict(timed) for name in LAYERS if (timed := getattr(self, name)) is not None},
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
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    clock: str = "wall",
    on_round: Callable[[int, ModelShape | None], None] = lambda rounds, finished: None,
) -> list[LayerTimes]:
    """Create process groups, time each shape (on CUDA if available, otherwise on the CPU), and destroy the groups.

    Args:
        clock: `wall`, or `cpu` for the CPU time of this process, which is less sensitive to other load (and
            does not measure a CUDA device).
        on_round: called after each round with the rounds done in all and, after its last round, the shape.

    Returns:
        For each shape those of each dtype.

    Raises:
        LayersDifferError: our layer's output is not that of Megatron's.
    """
    device = process_groups.start(ParallelSettings(), seed=1234, env=process_groups.DistributedEnv())
    try:
        results = []
        for index, shape in enumerate(shapes):

            def after(rounds: int, index: int = index, shape: ModelShape = shape) -> None:
                on_round(index * repeats + rounds, shape if rounds == repeats else None)

            results += time_layers(shape, repeats, dtypes, device, clock, after)
        return results
    finally:
        process_groups.stop()


def time_layers(
    shape: ModelShape,
    repeats: int,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    clock: str = "wall",
    on_round: Callable[[int], None] = lambda rounds: None,
    spec: Stock = "local",
) -> list[LayerTimes]:
    """Build the layers of one shape, compare outputs, and time them alternately; Megatron's groups must exist.

    Args:
        spec: whose parts all layers have but for the loops. Not yet run with Transformer Engine.

    Returns:
        Of each dtype.
    """
    steps: dict[tuple[torch.dtype, str], Callable[[], None]] = {}
    differences = {}
    for dtype in dtypes:
        layers, differences[dtype] = _layers(shape, dtype, spec, device)
        steps |= {(dtype, name): _step(layer, shape, dtype, device) for name, layer in layers.items()}
    seconds: dict[tuple[torch.dtype, str], list[float]] = {which: [] for which in steps}
    for round_ in range(-_WARM_UP, repeats):
        for which, step in steps.items():
            taken = _seconds(step, device, CLOCKS[clock])
            if round_ >= 0:
                seconds[which].append(taken)
        if round_ >= 0:
            on_round(round_ + 1)
    results = []
    for dtype in dtypes:
        stock, ours, coe = (Seconds.of(seconds[dtype, name]) for name in LAYERS[:3])
        loops = Seconds.of(seconds[dtype, "loops"]) if (dtype, "loops") in seconds else None
        results.append(LayerTimes(shape, dtype, stock, ours, coe, loops, differences[dtype]))
    return results


def _layers(
    shape: ModelShape, dtype: torch.dtype, spec: Stock, device: torch.device
) -> tuple[dict[str, torch.nn.Module], float]:
    """The layers to time, by name, and how far the outputs of the first two are apart."""
    chain = halved_chain(shape)
    stock, ours = _stock(shape, dtype, spec), _ours(shape, dtype, spec)
    _copy_weights(stock, ours)
    hidden = torch.randn(shape.seq_length, 1, shape.hidden, dtype=dtype, device=device)
    difference = _require_equal(stock, ours, hidden)
    layers: dict[str, torch.nn.Module] = {"stock": stock, "ours": ours, "coe": _ours(chain, dtype, spec)}
    if dtype == torch.float32:
        layers["loops"] = _loops(chain, device)
    return layers, difference


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
    """A line per shape and dtype; ratios of minima, then after a slash of medians."""
    head = [*_SIZES, "dtype", "stock", "ours", "CoE-2(K/2)", "speed-up", "loops/CoE"]
    return "\n".join(aligned([[*head, "CoE/MoE", "FLOPs", "time/FLOPs"], *map(_cells, results)], ">"))


def _cells(result: LayerTimes) -> list[str]:
    shape = result.shape
    stock, ours, coe = (f"{1e3 * timed.minimum:.1f} ms" for timed in (result.stock, result.ours, result.coe))
    loops = "" if result.loops is None else str(result.loops.over(result.coe))
    ratios = (str(result.speed_up), loops, str(result.time_ratio), f"{result.flops_ratio:.3f}")
    return [*_sizes(shape), NAMES[result.dtype], stock, ours, coe, *ratios, str(result.time_over_flops)]


def dtypes_table(results: list[LayerTimes]) -> str:
    """fp32 over bf16 by shape, each of which was timed in both, one after the other: above 1, bf16 is faster."""
    rows = [[*_SIZES, *(f"fp32/bf16 {name}" for name in LAYERS[:3])]]
    for fp32, bf16 in zip(results[::2], results[1::2], strict=True):
        rows.append([*_sizes(fp32.shape), *(str(getattr(fp32, n).over(getattr(bf16, n))) for n in LAYERS[:3])])
    return "\n".join(aligned(rows, ">"))


def _sizes(shape: ModelShape) -> list[str]:
    """The columns `_SIZES`."""
    return [str(size) for size in (shape.hidden, shape.expert_ffn, shape.experts, shape.topk, shape.seq_length)]


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
        moe_aux_loss_coeff=_AUX_LOSS,
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


def _loops(shape: ModelShape, device: torch.device) -> ChainOfExperts:
    router = RouterSettings(shape.experts, shape.topk, renormalise=True, aux_coeff=_AUX_LOSS)
    shared = shape.shared_ffn
    return ChainOfExperts(shape.hidden, shape.expert_ffn, router, shape.chain, shared_ffn=shared).to(device)


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


def _step(layer: torch.nn.Module, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Forward and backward on one batch of random states."""
    hidden = torch.randn(shape.seq_length, 1, shape.hidden, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn_like(hidden)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        hidden.grad = None
        if isinstance(layer, ChainOfExperts):
            result = layer(hidden.transpose(0, 1))
            ((result.stream.transpose(0, 1) * gradient).sum() + result.total_loss).backward()
        else:
            layer(hidden)[0].backward(gradient)

    return step


def _seconds(step: Callable[[], None], device: torch.device, clock: Callable[[], float]) -> float:
    _wait(device)
    start = clock()
    step()
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
