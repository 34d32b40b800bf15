"""Every test of `modules` runs on one rank and leaves nothing in Megatron's module-level state."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def clean_megatron(single_rank: None) -> Iterator[None]:
    from modules_build import reset_megatron

    reset_megatron()
    yield
    reset_megatron()
