"""The GPU tier: run it by itself, `pytest -m gpu`; its process groups are NCCL's, on this machine's first device."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """The CUDA device, as the only rank of Megatron's groups."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: nothing to run the GPU tier on")
    from coe_megatron.config.settings import ParallelSettings
    from coe_megatron.distributed import process_groups

    yield process_groups.start(ParallelSettings(), 1234, process_groups.DistributedEnv())
    process_groups.stop()
