"""Every test of `modules` runs on one rank and leaves nothing in Megatron's module-level state."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def clean_megatron(single_rank: None) -> Iterator[None]:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from modules_build import reset_megatron

    reset_megatron()
    model_parallel_cuda_manual_seed(1234)  # of weights and dropout; else they would depend on the tests before
    yield
    reset_megatron()
