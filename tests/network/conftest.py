"""Hosts that are network namespaces, and a tiny run to train on them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cables import Network, unable
from programs import losses, python, torchrun

SMALL = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 32, hidden_dropout: 0.1}
moe: {num_experts: 8, topk: 2, ffn_hidden_size: 16}
data: {validation_samples: 8}
optimizer: {lr: 3e-3}
parallel: {expert: 2}
training: {steps: 30, global_batch: 16, micro_batch: 4, log_every: 1, evaluate_every: 30, save_every: 5}
"""


@pytest.fixture(scope="session", autouse=True)
def able() -> None:
    if reason := unable():
        pytest.skip(f"hosts cannot be made of network namespaces here: {reason}")


@pytest.fixture
def network(tmp_path: Path) -> Callable[..., Network]:
    """Makes hosts that have these cables."""
    return lambda *cables: Network(list(cables), tmp_path / "shell")


@pytest.fixture
def two_hosts(network: Callable[..., Network]) -> Iterator[Network]:
    """2 ms from one to the other, 200 Mbit a second."""
    with network("delay 1ms rate 200mbit", "delay 1ms rate 200mbit") as made:
        yield made


@pytest.fixture(scope="session")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    """Of pretrain_coe.py, for a run of two ranks into a folder."""
    folder = tmp_path_factory.mktemp("network")
    done = python("launch/prepare_data.py", "--builtin", 400, "--vocab-size", 512, "--output", folder / "data")
    assert done.returncode == 0, done.stderr
    (folder / "small.yaml").write_text(SMALL)
    return lambda output: [str(folder / "small.yaml"), f"data.path={folder / 'data'}", f"output={output}"]


@pytest.fixture(scope="session")
def undisturbed(arguments: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of that run on this machine, without a network."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = torchrun("launch/pretrain_coe.py", *arguments(folder))
    assert done.returncode == 0, done.stderr
    return losses(folder)
