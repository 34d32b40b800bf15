"""Lets Megatron-Core run where there is no CUDA device. Programs call `install()`; importing does nothing.

What is replaced, and why (Megatron-Core 0.16.1):

* `torch.cuda.current_device`: Megatron allocates with `device=torch.cuda.current_device()` in some thirty places. Where
  there is no CUDA the call can only raise; it now answers the CPU.
* `torch.cuda.synchronize`: called when a distributed checkpoint is saved; without CUDA there is nothing to wait for.
* `random._get_cuda_rng_state`, `random._set_cuda_rng_state`, `random.CudaRNGStatesTracker`: the generators that
  Megatron forks for dropout, initialisation and recompute are CUDA's; here they are states of the CPU generator.
* `MoEAlltoAllTokenDispatcher.cuda_dtoh_stream` and `._maybe_dtoh_and_synchronize`: split sizes travel to the host on a
  CUDA stream and stay tensors otherwise, which `all_to_all_single` refuses; here they become lists at once.
* `pipeline_parallel.schedules.torch`: all three schedules count tokens in a `torch.zeros(..., device="cuda")`. In that
  module alone the name `torch` now stands for torch with another `zeros`, which takes "cuda" for the current device.
* `tensor_parallel.mappings._gather_along_first_dim`: experts both divided and cut gather as many rows from each
  rank as it has got, and gloo's all-gather wants equally many. Rows of unequal number now come by an all-to-all.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """Apply the replacements where CUDA is missing; does nothing on a machine that has it."""
    if torch.cuda.is_available():
        return
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
    torch.cuda.synchronize = _nothing_to_wait_for  # type: ignore[assignment]
    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    random.CudaRNGStatesTracker = _cpu_tracker(random.CudaRNGStatesTracker)
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none: the split sizes are on the host already"
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _splits_to_lists
    schedules.torch = _TorchOfSchedules()
    mappings._gather_along_first_dim = _gathering_unequal_rows(mappings._gather_along_first_dim)


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _nothing_to_wait_for(_device: object = None) -> None:
    pass


def _get_rng_state(*_args, **_kwargs) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_args, **_kwargs) -> None:
    torch.set_rng_state(new_state)


def _cpu_tracker(base: type) -> type:
    """A tracker like Megatron's whose named states are states of the CPU generator."""
    if base.__name__ == "CpuRNGStatesTracker":
        return base

    class CpuRNGStatesTracker(base):
        def add(self, name: str, seed: int) -> None:
            if name in self.states_:
                raise ValueError(f"the generator state {name!r} exists already")
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
    """The CPU form of the dispatcher's copy to the host: what `all_to_all_single` reads becomes a list of int."""
    if not self.drop_and_pad and point == self.cuda_dtoh_point:
        for name in ("input_splits", "output_splits"):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.tolist())
    return tokens_per_expert


def _gathering_unequal_rows(stock: Callable) -> Callable:
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


class _TorchOfSchedules:
    """torch, but for a `zeros` that makes on the current device what is asked for on "cuda"."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device=torch.cuda.current_device() if device == "cuda" else device, **options)
