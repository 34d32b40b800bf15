"""What a run will cost, from its config alone: no torch, no data, no second rank. Behind `--dry-run`.

Bytes are of one rank. The formulas hold for what runs today: data and expert parallelism with ZeRO.
"""

from dataclasses import asdict, dataclass
from typing import Any, get_args

from coe_megatron.chain import closed_forms
from coe_megatron.chain.activations import Activations, Recompute, activations, extra_flops
from coe_megatron.chain.closed_forms import Flops, ModelShape, ParameterCount
from coe_megatron.config.settings import RunConfig
from coe_megatron.config.shape import model_shape, moe_pattern, padded_vocabulary, training_pass
from coe_megatron.data.folders import check_data, folders

_MASTER_AND_MOMENTS = 12  # bytes a parameter: fp32 master weight and AdamW's two moments
_FP32 = 4  # bytes; gradients are summed and sent in fp32
_PREFETCHED = 50_000_000  # parameters that DeepSpeed's stage 3 fetches ahead (stage3_prefetch_bucket_size)


@dataclass(frozen=True)
class Forecast:
    """The cost of a run.

    Attributes:
        parameters: of the whole model, by kind.
        flops_per_token: forward and backward, by kind.
        tokens_per_step: positions of a global batch, padding among them.
        memory: bytes a rank holds: weights, gradients, the buffer they are reduced in, the optimizer's masters and
            moments, and at their peak the activations of a micro-batch.
        layout: how many ranks there are, and how they share experts and batch.
        host: bytes a rank keeps in host memory by `zero.offload_...`.
        recompute: the run's `moe.recompute`.
        activations: bytes of a micro-batch's activations in each mode of `moe.recompute`, uniform routing assumed.
        extra_flops: FLOPs a token that each mode adds to `flops_per_token`.
        communication: bytes a rank sends in one step, by what for, uniform routing assumed.
    """

    layout: dict[str, int]
    parameters: ParameterCount
    flops_per_token: Flops
    tokens_per_step: int
    memory: dict[str, int]
    host: dict[str, int]
    recompute: Recompute
    activations: dict[str, Activations]
    extra_flops: dict[str, int]
    communication: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values with totals, for JSON."""
        counted, flops = self.parameters, self.flops_per_token
        totals = {name: getattr(counted, name) for name in ("total", "active", "without_embeddings")}
        return {
            "layout": self.layout,
            "parameters": totals | asdict(counted),
            "flops_per_token": {"total": flops.total} | asdict(flops),
            "tokens_per_step": self.tokens_per_step,
            "memory_bytes_per_rank": {"total": sum(self.memory.values())} | self.memory,
            "host_memory_bytes_per_rank": {"total": sum(self.host.values())} | self.host,
            "recompute": {
                mode: {"extra_flops_per_token": self.extra_flops[mode], "peak": each.peak} | asdict(each)
                for mode, each in self.activations.items()
            },
            "communication_bytes_per_rank_and_step": {"total": sum(self.communication.values())} | self.communication,
        }

    def table(self) -> str:
        """The same for a person."""
        counted, flops = self.parameters, self.flops_per_token
        rows = {
            "layout": ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in self.layout.items()),
            "parameters": f"{counted.total:,} in all, {counted.active:,} active for a token, "
            f"{counted.without_embeddings:,} without embeddings",
            "": ", ".join(f"{name} {value:,}" for name, value in asdict(counted).items() if value),
            "FLOPs a token": f"{flops.total:,} to train (forward and backward)",
            " ": ", ".join(f"{name} {value / flops.total:.1%}" for name, value in asdict(flops).items() if value),
            "tokens a step": f"{self.tokens_per_step:,}, {self.tokens_per_step * flops.total / 1e12:.3g} TFLOP",
            "memory a rank": _sizes(self.memory),
            **({"in host memory": _sizes(self.host)} if self.host else {}),
            "recompute": f"{self.recompute}; activations by mode: {', '.join(map(self._mode, self.activations))}",
            "sent a step": f"{_sizes(self.communication)} by each rank",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())

    def _mode(self, mode: str) -> str:
        extra = self.extra_flops[mode] / self.flops_per_token.total
        return f"{mode} {_size(self.activations[mode].peak)}" + (f" (+{extra:.0%} FLOPs)" if extra else "")


def forecast(config: RunConfig, vocab_size: int, world_size: int) -> Forecast:
    """The cost of a run.

    Args:
        vocab_size: rows of the embedding, padding included.
        world_size: number of ranks.
    """
    shape = model_shape(config, vocab_size)
    counted = closed_forms.parameters(shape)
    modes = {mode: activations(shape, training_pass(config, mode)) for mode in get_args(Recompute)}
    return Forecast(
        layout=_layout(config, world_size),
        parameters=counted,
        flops_per_token=closed_forms.training_flops(shape),
        tokens_per_step=config.training.global_batch * shape.seq_length,
        memory=_memory(config, counted, world_size) | {"activations": modes[config.moe.recompute].peak},
        host=_host(config, counted, world_size),
        recompute=config.moe.recompute,
        activations=modes,
        extra_flops={mode: extra_flops(shape, mode) for mode in modes},
        communication=_communication(config, shape, counted, world_size),
    )


def vocabulary(config: RunConfig, *, data_needed: bool = False) -> int:
    """Rows of the embedding: `model.vocab_size`, or what the prepared data's tokenizer asks for.

    Args:
        data_needed: that there is no data is an error, also where `model.vocab_size` is given.

    Raises:
        ValueError: neither is there to tell, or there is data and it does not suit (see `check_data`).
    """
    manifest = check_data(config, needed=data_needed)
    if manifest is not None:
        return padded_vocabulary(config, manifest.vocab_size)
    if config.model.vocab_size is None:
        missing = next(folders(config.data))
        raise ValueError(
            "model.vocab_size is null: without prepared data it must be given "
            f"(there is no folder {missing.path}, which {missing.setting} names)"
        )
    return config.model.vocab_size


def _layout(config: RunConfig, ranks: int) -> dict[str, int]:
    expert, training = config.parallel.expert, config.training
    return {
        "ranks": ranks,
        "expert_parallel": expert,
        "replicas_of_an_expert": ranks // expert,
        "micro_batch": training.micro_batch,
        "micro_batches_a_step": training.global_batch // (training.micro_batch * ranks),
    }


def _memory(config: RunConfig, counted: ParameterCount, ranks: int) -> dict[str, int]:
    """What ZeRO leaves on the device; measured on DeepSpeed, see the tests.

    Experts lie on EP ranks. A cut cuts them over their replicas, and all that is dense over all ranks.
    """
    whole, part = _whole_and_part(config, counted, ranks)
    stage, bf16 = config.zero.stage, config.training.precision == "bf16"
    return {
        "weights": _bytes(config) * (part if stage == 3 else whole),
        "gathered": _bytes(config) * _gathered(config, counted, whole) if stage == 3 else 0,
        # Stage 1 in bf16 keeps bf16 gradients beside their fp32 sums, and reduces in place.
        "gradients": _FP32 * (part if stage > 1 else whole) + (2 * whole if bf16 and stage == 1 else 0),
        "buffer": config.zero.reduce_bucket_size * (0, 0 if bf16 else _FP32, _bytes(config), _FP32)[stage],
        "optimizer": 0 if config.zero.offload_optimizer else _optimizer_bytes(config, whole, part),
    }


def _host(config: RunConfig, counted: ParameterCount, ranks: int) -> dict[str, int]:
    """What a rank keeps in its host's memory by choice."""
    whole, part = _whole_and_part(config, counted, ranks)
    kept = {
        "optimizer": _optimizer_bytes(config, whole, part) if config.zero.offload_optimizer else 0,
        "weights": _bytes(config) * part if config.zero.offload_parameters else 0,
    }
    return {name: size for name, size in kept.items() if size}


def _optimizer_bytes(config: RunConfig, whole: int, part: int) -> int:
    return (_MASTER_AND_MOMENTS - _FP32) * whole if config.zero.stage == 0 else _MASTER_AND_MOMENTS * part


def _gathered(config: RunConfig, counted: ParameterCount, whole: int) -> int:
    """Weights of stage 3 that are whole at a time: the largest layer or table, and what DeepSpeed fetches ahead."""
    layers = config.model.num_layers
    layer = -(-(counted.without_embeddings - counted.experts) // layers)
    layer += -(-counted.experts // config.parallel.expert // max(1, sum(moe_pattern(config))))
    return min(whole, max(layer, counted.embedding) + _PREFETCHED)


def _communication(config: RunConfig, shape: ModelShape, counted: ParameterCount, ranks: int) -> dict[str, int]:
    """Ring algorithms: reducing to all sends 2 (n-1)/n of the data, scattering or gathering (n-1)/n, over n ranks.

    Stages 0 and 1 reduce once a step; 2 and 3 scatter the gradients of every micro-batch. Stages 1 and 2 gather
    weights once a step, 3 twice a micro-batch. The all-to-all sends each of K copies of a token there and back, in each
    of C iterations, forward and backward, but for the 1/EP of them that stay.
    """
    dense, experts, replicas = _held(config, counted, ranks)
    expert, stage = config.parallel.expert, config.zero.stage
    copies = shape.num_moe_layers * shape.chain.iterations * shape.topk
    tokens = config.training.global_batch * shape.seq_length // ranks
    micro_batches = config.training.global_batch // (config.training.micro_batch * ranks)
    sent = dense * (ranks - 1) // ranks + experts * (replicas - 1) // replicas
    return {
        "all_to_all": 4 * tokens * copies * shape.hidden * _bytes(config) * (expert - 1) // expert,
        "gradients": _FP32 * sent * (2 if stage < 2 else micro_batches),
        "weights": _bytes(config) * sent * (0, 1, 1, 2 * micro_batches)[stage],
    }


def _whole_and_part(config: RunConfig, counted: ParameterCount, ranks: int) -> tuple[int, int]:
    """Parameters of a rank, and of them what is left when ZeRO has cut them."""
    dense, experts, replicas = _held(config, counted, ranks)
    return dense + experts, -(-dense // ranks) + -(-experts // replicas)


def _held(config: RunConfig, counted: ParameterCount, ranks: int) -> tuple[int, int, int]:
    """Dense and expert parameters on a rank, and how many ranks hold the same experts."""
    expert = config.parallel.expert
    return counted.total - counted.experts, counted.experts // expert, ranks // expert


def _bytes(config: RunConfig) -> int:
    return 2 if config.training.precision == "bf16" else 4


def _sizes(parts: dict[str, int]) -> str:
    listed = ", ".join(f"{name.replace('_', '-')} {_size(value)}" for name, value in parts.items() if value)
    return _size(sum(parts.values())) + (f" ({listed})" if listed else "")


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 10 * 2**30 else f"{count / 2**20:,.1f} MiB"
