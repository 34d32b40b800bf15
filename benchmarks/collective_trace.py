"""Records the collectives that this process takes part in: kind, purpose, whether it waits for them, bytes sent."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {  # by the name of the operator in torch's namespace c10d, without "_" around it
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "allgather": "all-gather",
    "allgather_base": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "alltoall": "all-to-all",
    "alltoall_base": "all-to-all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "reduce_scatter": "reduce-scatter",
    "reduce_scatter_base": "reduce-scatter",
}
PURPOSES = {  # by the innermost function that is no plumbing; others are named as they are
    "MoEAlltoAllTokenDispatcher.preprocess": "tokens per expert",
    "MoEAlltoAllTokenDispatcher.token_dispatch": "dispatch",
    "MoEAlltoAllTokenDispatcher.token_combine": "combine",
    "Exchange._ask": "rows per rank",
    "Exchange.depart": "dispatch",
    "Exchange.work": "combine",
    "DeepSpeedEngine.backward": "dispatch and combine, backward",
    "DeepSpeedZeroOptimizer.allreduce_bucket": "gradients",
    "DeepSpeedZeroOptimizer.gradient_reduction_w_predivide": "gradients",
    "norm_of_partitions": "gradient norm",
    "_gather_weights": "weights after the step",
    "_one_or_nan": "loss before the last backward pass",
    "_start_agreement": "loss and stop requests",
    "Pretraining._train_step": "number of counted tokens",
    "Pretraining._require_output": "output folder exists",
    "_report_stage": "routing statistics",
    "report_routing": "routing statistics",
}
_PLUMBING = (  # modules, and functions below
    "torch.",
    "typing_extensions",
    "deepspeed.comm.",
    "deepspeed.utils.",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.utils",
    "coe_megatron.distributed.collectives",
    "coe_megatron.distributed.flights",
    "coe_megatron.local_backend.without_cuda",
    __name__,
)
_PLUMBING_FUNCTIONS = ("replica_sum", "wrapped_fn", "wrapper", "decorate_context")
_SENT = ("input", "inputs", "input_tensor", "input_tensors", "tensors", "tensor")  # arguments that hold what is sent


@dataclass(frozen=True)
class Call:
    """One collective of a group of at least two ranks.

    Attributes:
        kind: all-reduce, all-to-all, ...
        purpose: what for, or the function that calls it.
        waits: whether the process waits for it before it goes on.
        sent: bytes that this rank sends if every byte takes the shortest way (a ring for sums); without headers.
    """

    kind: str
    purpose: str
    waits: bool
    sent: int


class CollectiveTrace(TorchDispatchMode):
    """Records the collectives that this thread starts in this context, in order, in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operation, and record it if it is a collective."""
        if function.namespace == "c10d":
            given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False))
            self._record(function._schema.name.removeprefix("c10d::").strip("_"), given | (kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _record(self, operator: str, given: dict[str, Any]) -> None:
        ranks = dist.ProcessGroup.unbox(given["process_group"]).size()
        if ranks == 1:
            return
        kind = KINDS.get(operator, operator)
        tensors = next((tree_leaves(given[name]) for name in _SENT if name in given), [])
        size = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
        own = _kept(given, size) if kind == "all-to-all" else 0
        self.calls.append(Call(kind, _purpose(), not given.get("async_op", True), _sent(kind, size - own, ranks)))


def _kept(given: dict[str, Any], size: int) -> int:
    """Bytes of an all-to-all that stay on this rank."""
    group = dist.ProcessGroup.unbox(given["process_group"])
    splits = given.get("input_split_sizes") or [1] * group.size()
    return size * splits[group.rank()] // max(1, sum(splits))


def _sent(kind: str, size: int, ranks: int) -> int:
    match kind:
        case "all-reduce":
            return 2 * size * (ranks - 1) // ranks
        case "reduce-scatter" | "reduce" | "broadcast":
            return size * (ranks - 1) // ranks
        case "all-gather":
            return size * (ranks - 1)
        case "recv" | "recv_any_source" | "barrier":
            return 0
        case _:
            return size


def _purpose() -> str:
    for frame in _frames():
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname
        if not module.startswith(_PLUMBING) and not name.startswith("<") and name not in _PLUMBING_FUNCTIONS:
            name = name.partition(".<locals>")[0]
            return PURPOSES.get(name, name)
    return "?"


def _frames() -> Iterator[FrameType]:
    """The functions that are running, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
