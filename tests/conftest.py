"""Fixtures of all tests: one process with Megatron's groups, and where the real text lies."""

import gc
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import start_groups

pytest_plugins = ["small_run"]

SLOW = ("ranks", "run", "network", "slurm")
_CURRENT = "PYTEST_CURRENT_TEST"


def pytest_configure() -> None:
    """Ctrl-C has its meaning for tests and their programs also where a shell has started them with `&` or nohup."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)  # when only those that will run are left
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests first: of several workers, which take a file each, none is left with a long one."""
    slow = Counter(item.path for item in items for marker in SLOW if item.get_closest_marker(marker))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """What was imported and collected lives as long as the tests: no collection of garbage has to look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def megatron_groups(tmp_path_factory: pytest.TempPathFactory) -> None:
    """This very process as the only rank of Megatron's groups (made once, on one thread)."""
    meeting = tmp_path_factory.mktemp("rendezvous") / "file"
    start_groups(0, 1, f"file://{meeting}")


@pytest.fixture
def single_rank(megatron_groups: None) -> Iterator[None]:
    """The only rank, with Megatron's seeds and module-level state as if no test had run before."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from model_build import reset_megatron

    reset_megatron()
    model_parallel_cuda_manual_seed(1234)
    yield
    reset_megatron()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(1234)


@pytest.fixture(scope="session", autouse=True)
def given_environment() -> dict[str, str]:
    """The environment before any test; pytest keeps the name of the current test in it, which is not of the user's."""
    return {name: value for name, value in os.environ.items() if name != _CURRENT}


@pytest.fixture(autouse=True)
def own_environment(given_environment: dict[str, str]) -> Iterator[None]:
    """What a test, a session's fixture, or DeepSpeed within them, puts into the environment no other test sees."""
    _restore(given_environment)
    yield
    _restore(given_environment)


def _restore(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys() - {_CURRENT}:
        del os.environ[name]
    os.environ.update(environment)


@pytest.fixture(scope="session")
def real_text() -> Path:
    """The folder with real text that COE_DATA_DIR names; a test that needs it is skipped without."""
    folder = os.environ.get("COE_DATA_DIR")
    if not folder:
        pytest.skip("COE_DATA_DIR is not set: no real text to test with")
    return Path(folder)
