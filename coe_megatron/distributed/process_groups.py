"""Starts and ends a rank: device, process groups, seeds. Answers what DeepSpeed asks of Megatron's groups, too."""

import math
import os
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from coe_megatron.config.settings import ParallelSettings
from coe_megatron.distributed import affinity
from coe_megatron.distributed.environment import DistributedEnv
from coe_megatron.distributed.rendezvous import LOOPBACK, meet
from coe_megatron.errors import ConfigError
from coe_megatron.launcher import network
from coe_megatron.local_backend import megatron_compat, without_cuda

# Megatron derives the seeds of its generators by adding up to a few thousand (2718 + TP rank, 1024 + 100 x EP rank).
_SEEDS_OF_A_RANK = 10_000


def start(
    parallel: ParallelSettings,
    seed: int,
    ranks: DistributedEnv | None = None,
    timeout: timedelta | None = None,
    store: dist.Store | None = None,
) -> torch.device:
    """Make this process a rank: compatibility parts, device with its processors, process groups, and seeds.

    Equal seeds let replicas build equal weights; each pipeline stage has a seed of its own, or its layers would be
    those of the first. Call `seed_dropout` when the model is built.

    Args:
        ranks: which rank this is; what torchrun says when None.
        timeout: after which a collective that waits for others is an error; torch's and Megatron's own when None.
        store: from `meet`, which is called when None.

    Where all ranks are on one host, gloo and NCCL listen at its loopback interface alone.

    Returns:
        The rank's device: its CUDA device (with NCCL), or the CPU (with gloo) where there is no CUDA.
    """
    ranks = DistributedEnv.from_environment(os.environ) if ranks is None else ranks
    megatron_compat.install()
    without_cuda.install()
    device = _device(ranks)
    if ranks.one_host:
        with suppress(ConfigError):  # a container may have no such interface
            network.use_interface_towards(LOOPBACK, os.environ)
    backend = "nccl" if device.type == "cuda" else "gloo"
    own = device if device.type == "cuda" else None  # lets NCCL connect at once, to the right device
    dist.init_process_group(
        backend,
        store=store or meet(ranks),
        rank=ranks.rank,
        world_size=ranks.world_size,
        device_id=own,
        timeout=timeout,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        **({} if timeout is None else {"distributed_timeout_minutes": math.ceil(timeout / timedelta(minutes=1))}),
    )
    _seed(seed, parallel_state.get_pipeline_model_parallel_rank())
    return device


def stop() -> None:
    """End what `start` began, on all ranks together."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def seed_dropout(seed: int) -> None:
    """Give every replica of the model random numbers of its own, so that dropout masks differ where the data differ.

    Ranks of tensor parallelism go on sharing a seed: what has to differ between them Megatron takes from its own
    generators. To be called when the weights are made.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    replica, stage = parallel_state.get_data_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    _seed(seed, stages * (1 + replica) + stage)


def _seed(seed: int, which: int) -> None:
    own = seed + _SEEDS_OF_A_RANK * which
    torch.manual_seed(own)
    model_parallel_cuda_manual_seed(own)


def _device(ranks: DistributedEnv) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    affinity.bind_near(device)
    return device


class MegatronGroups:
    """Megatron's groups under the names that DeepSpeed looks for on its `mpu` (parallel_state alone lacks some).

    The model-parallel group is TP x PP: over it DeepSpeed adds up gradient norms, and with TP alone every pipeline
    stage would clip by the norm of its own parameters.
    """

    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)

    @staticmethod
    def get_model_parallel_world_size() -> int:
        """Ranks that hold one whole model between them."""
        return parallel_state.get_model_parallel_group().size()

    @staticmethod
    def get_model_parallel_rank() -> int:
        """This rank's place among them."""
        return parallel_state.get_model_parallel_group().rank()

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Global ranks of this rank's data-parallel group."""
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
