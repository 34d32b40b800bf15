"""Lets Megatron-Core run without a CUDA device. Programs call `install()`; importing does nothing.

Replacements and reasons (Megatron-Core 0.16.1 and 0.19.2):

* `torch.cuda.current_device`: Megatron allocates with `device=torch.cuda.current_device()` in some thirty places.
  Without CUDA the call would raise; it now returns the CPU.
* `torch.cuda.synchronize`: called when a distributed checkpoint is saved; without CUDA it does nothing.
* `torch.cuda.current_stream`: 0.19.2 takes it before gradients are reduced, and uses it with CUDA graphs only.
* `random._get_cuda_rng_state`, `random._set_cuda_rng_state`, `random.CudaRNGStatesTracker`: Megatron
  forks CUDA generators for dropout, initialisation and recompute; these use states of the CPU generator instead.
* `MoEAlltoAllTokenDispatcher.cuda_dtoh_stream` and `._maybe_dtoh_and_synchronize`: these copy split sizes to the
  host on a CUDA stream; without it they stay tensors, which `all_to_all_single` refuses. They now become lists at once.
* `pipeline_parallel.schedules.torch`: all three schedules count tokens in a `torch.zeros(..., device="cuda")`. In that
  module only, `torch` is now a wrapper whose `zeros` treats "cuda" as the current device.
* `tensor_parallel.mappings._gather_along_first_dim`: with EP and ETP together, ranks gather unequal numbers of rows,
  but gloo's all-gather requires equal numbers. Unequal ones now use an all-to-all.
* `get_pos_emb_on_this_cp_rank` of the rotary embeddings: with context parallelism it takes a rank's part by indices in
  pinned memory, which needs CUDA. It now takes the same part in another way.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from coe_megatron.sequence_parts import own_part


def install() -> None:
    """Apply the replacements if CUDA is missing; otherwise do nothing."""
    if torch.cuda.is_available():
        return
    from megatron.core.models.common.embeddings import rotary_pos_embedding, yarn_rotary_pos_embedding
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
    torch.cuda.synchronize = _no_synchronize  # type: ignore[assignment]
    torch.cuda.current_stream = _no_stream  # type: ignore[assignment]
    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    random.CudaRNGStatesTracker = _cpu_tracker(random.CudaRNGStatesTracker)
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "unused: split sizes are already on the host"
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _splits_to_lists
    schedules.torch = _TorchOfSchedules()
    mappings._gather_along_first_dim = _gather_unequal_rows(mappings._gather_along_first_dim)
    rotary_pos_embedding.get_pos_emb_on_this_cp_rank = _part_of_angles
    yarn_rotary_pos_embedding.get_pos_emb_on_this_cp_rank = _part_of_angles


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _no_synchronize(_device: object = None) -> None:
    pass


def _no_stream(_device: object = None) -> None:
    pass


def _get_rng_state(*_args, **_kwargs) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_args, **_kwargs) -> None:
    torch.set_rng_state(new_state)


def _cpu_tracker(base: type) -> type:
    """A subclass of Megatron's tracker whose named states are those of the CPU generator."""
    if base.__name__ == "CpuRNGStatesTracker":
        return base

    class CpuRNGStatesTracker(base):
        def add(self, name: str, seed: int) -> None:
            if name in self.states_:
                raise ValueError(f"the generator state {name!r} already exists")
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            if name not in self.states_:
                raise ValueError(
                    f"there is no generator state {name!r}: call megatron.core.tensor_parallel.random."
                    "model_parallel_cuda_manual_seed(seed) before the model is built"
                )
            before = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(before)

    return CpuRNGStatesTracker


def _splits_to_lists(self, point: str, tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """Replaces the dispatcher's copy to the host: split sizes for `all_to_all_single` become lists of int."""
    if not self.drop_and_pad and point == self.cuda_dtoh_point:
        for name in ("input_splits", "output_splits"):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.tolist())
    return tokens_per_expert


def _gather_unequal_rows(stock: Callable) -> Callable:
    """Megatron's gather of rows [T_r, ...] of all ranks r -> [sum of T_r, ...], where T_r may differ."""
    if stock.__name__ == "gather_along_first_dim":
        return stock

    def gather_along_first_dim(
        input_: torch.Tensor, group: dist.ProcessGroup, output_split_sizes=None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return stock(input_, group, output_split_sizes, use_global_buffer)
        counts = [int(count) for count in output_split_sizes]
        output = input_.new_empty(sum(counts), *input_.shape[1:])
        dist.all_to_all_single(
            output, torch.cat([input_] * group.size()), counts, [len(input_)] * group.size(), group=group
        )
        return output

    return gather_along_first_dim


def _part_of_angles(pos_emb: torch.Tensor, seq_dim: int, cp_group: dist.ProcessGroup) -> torch.Tensor:
    return own_part(pos_emb, seq_dim, cp_group.rank(), cp_group.size())


class _TorchOfSchedules:
    """torch, except that `zeros(device="cuda")` allocates on the current device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device=torch.cuda.current_device() if device == "cuda" else device, **options)
