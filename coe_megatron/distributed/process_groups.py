"""Initialises a rank: device, process groups, seeds. Also gives DeepSpeed Megatron's groups as its `mpu`."""

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
from coe_megatron.distributed.rendezvous import LOOPBACK, rendezvous
from coe_megatron.errors import ConfigError
from coe_megatron.launcher import network
from coe_megatron.local_backend import megatron_compat, without_cuda

# Megatron adds up to a few thousand to the seed for each of its generators (2718 + TP rank, 1024 + 100 x EP rank).
_SEED_STRIDE = 10_000


def start(
    parallel: ParallelSettings,
    seed: int,
    env: DistributedEnv | None = None,
    timeout: timedelta | None = None,
    store: dist.Store | None = None,
) -> torch.device:
    """Initialise this rank: local backend, device and CPU affinity, process groups, and seeds.

    The seeds are those of `seed_weights`. Call `seed_dropout` after the model is built.

    Args:
        env: rank and world size of this process; read from the environment when None.
        timeout: of collectives; torch's and Megatron's defaults when None.
        store: from `rendezvous`, which is called when None.

    If all ranks are on one host, gloo and NCCL use only its loopback interface.

    Returns:
        The rank's device: its CUDA device (with NCCL), or the CPU (with gloo) if there is no CUDA.
    """
    env = DistributedEnv.from_environment(os.environ) if env is None else env
    megatron_compat.install()
    without_cuda.install()
    device = _device(env)
    if env.single_node:
        with suppress(ConfigError):  # a container may have no such interface
            network.use_interface_towards(LOOPBACK, os.environ)
    backend = "nccl" if device.type == "cuda" else "gloo"
    own = device if device.type == "cuda" else None  # lets NCCL connect at once, to the right device
    dist.init_process_group(
        backend,
        store=store or rendezvous(env),
        rank=env.rank,
        world_size=env.world_size,
        device_id=own,
        timeout=timeout,
    )
    create_groups(parallel, timeout)
    seed_weights(seed)
    return device


def create_groups(parallel: ParallelSettings, timeout: timedelta | None = None) -> None:
    """Create Megatron's process groups; collective, after the default group of torch is initialised.

    Without the gloo copies of data-parallel groups, which only Megatron's own optimizer uses: they would connect each
    rank to every other rank of these groups.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
        **({} if timeout is None else {"distributed_timeout_minutes": math.ceil(timeout / timedelta(minutes=1))}),
    )


def stop() -> None:
    """Destroy the process groups; collective."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def seed_weights(seed: int) -> None:
    """Give all replicas of the model the same seed, so that they build equal weights.

    Each pipeline stage has its own, so that its layers differ from those of the first stage.
    """
    _seed(seed, parallel_state.get_pipeline_model_parallel_rank())


def seed_dropout(seed: int) -> None:
    """Give each replica of the model its own seed, so that dropout masks differ where the tokens differ.

    Tensor-parallel ranks keep sharing a seed: Megatron draws what must differ between them from its own generators.
    Call this after the weights are initialised.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    replica, stage = replicas().rank(), parallel_state.get_pipeline_model_parallel_rank()
    _seed(seed, stages * (1 + replica) + stage)


def replicas() -> dist.ProcessGroup:
    """The replicas of this rank's dense parameters; with context parallelism several of them share sequences."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _seed(seed: int, which: int) -> None:
    own = seed + _SEED_STRIDE * which
    torch.manual_seed(own)
    model_parallel_cuda_manual_seed(own)


def _device(env: DistributedEnv) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", env.local_rank)
    torch.cuda.set_device(device)
    affinity.set_cpu_affinity(device)
    return device


class MegatronGroups:
    """Megatron's groups under the names that DeepSpeed expects on its `mpu`; parallel_state itself lacks some.

    The model-parallel group is TP x PP: DeepSpeed sums gradient norms over it, and with TP alone every pipeline stage
    would clip by the norm of its own parameters.
    """

    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)

    @staticmethod
    def get_model_parallel_world_size() -> int:
        """Number of ranks that hold one replica of the model."""
        return parallel_state.get_model_parallel_group().size()

    @staticmethod
    def get_model_parallel_rank() -> int:
        """This rank's index in that group."""
        return parallel_state.get_model_parallel_group().rank()

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        """The ranks over which gradients are summed and ZeRO partitions."""
        return replicas()

    @staticmethod
    def get_data_parallel_world_size() -> int:
        """Their number."""
        return replicas().size()

    @staticmethod
    def get_data_parallel_rank() -> int:
        """This rank's index in that group."""
        return replicas().rank()

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Their global ranks."""
        return dist.get_process_group_ranks(replicas())
