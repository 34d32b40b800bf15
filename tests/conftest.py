"""Fixtures of all tests: one process with Megatron's groups, and where the real text lies."""

import os
from pathlib import Path

import pytest
import torch
from ranks import start_groups


@pytest.fixture(scope="session")
def single_rank(tmp_path_factory: pytest.TempPathFactory) -> None:
    """This very process as the only rank of Megatron's groups (made once, on one thread)."""
    meeting = tmp_path_factory.mktemp("rendezvous") / "file"
    start_groups(0, 1, f"file://{meeting}")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(1234)


@pytest.fixture(scope="session")
def real_text() -> Path:
    """The folder with real text that COE_DATA_DIR names; a test that needs it is skipped without."""
    folder = os.environ.get("COE_DATA_DIR")
    if not folder:
        pytest.skip("COE_DATA_DIR is not set: no real text to test with")
    return Path(folder)
