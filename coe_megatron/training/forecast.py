"""What a run will cost, from its config alone: no torch, no data, no second rank. Behind `--dry-run`.

Bytes are of one rank. The formulas hold for what runs today: data and expert parallelism with ZeRO-1.
"""

from dataclasses import asdict, dataclass
from typing import Any, get_args

from coe_megatron.chain import closed_forms
from coe_megatron.chain.activations import Activations, Recompute, activations, extra_flops
from coe_megatron.chain.closed_forms import Flops, ModelShape, ParameterCount
from coe_megatron.config.settings import RunConfig
from coe_megatron.config.shape import model_shape, padded_vocabulary, training_pass
from coe_megatron.data.folders import check_data, folders

_MASTER_AND_MOMENTS = 12  # bytes a parameter: fp32 master weight and AdamW's two moments
_FP32 = 4  # bytes; gradients are summed and sent in fp32


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
    """Experts lie on EP ranks; their states are cut over the replicas of these, dense states over all ranks."""
    dense, experts, replicas = _held(config, counted, ranks)
    bf16 = config.training.precision == "bf16"  # keeps bf16 gradients beside their fp32 sums, and reduces in place
    return {
        "weights": _bytes(config) * (dense + experts),
        "gradients": (_FP32 + (2 if bf16 else 0)) * (dense + experts),
        "buffer": 0 if bf16 else _FP32 * config.zero.reduce_bucket_size,
        "optimizer": _MASTER_AND_MOMENTS * (-(-dense // ranks) + -(-experts // replicas)),
    }


def _communication(config: RunConfig, shape: ModelShape, counted: ParameterCount, ranks: int) -> dict[str, int]:
    """Ring algorithms: reducing sends 2 (n-1)/n of the data and gathering (n-1)/n, over n ranks.

    The all-to-all sends each of K copies of a token there and back, in each of C iterations, forward and backward, but
    for the 1/EP of them that stay.
    """
    dense, experts, replicas = _held(config, counted, ranks)
    expert = config.parallel.expert
    copies = shape.num_moe_layers * shape.chain.iterations * shape.topk
    tokens = config.training.global_batch * shape.seq_length // ranks
    return {
        "all_to_all": 4 * tokens * copies * shape.hidden * _bytes(config) * (expert - 1) // expert,
        "gradients": 2 * _FP32 * (dense * (ranks - 1) // ranks + experts * (replicas - 1) // replicas),
        "weights": _bytes(config) * (dense * (ranks - 1) // ranks + experts * (replicas - 1) // replicas),
    }


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
