"""A tiny run: its data, its config, and how it ends when nothing disturbs it."""

from pathlib import Path

import pytest
from programs import python, torchrun

SMALL = """
model:
  {num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 32, hidden_dropout: 0.1, attention_dropout: 0.1}
moe: {num_experts: 8, topk: 2, ffn_hidden_size: 16}
data: {validation_samples: 8}
optimizer: {lr: 3e-3}
parallel: {expert: 2}
training: {steps: 12, global_batch: 16, micro_batch: 4, log_every: 1, evaluate_every: 6, save_every: 4}
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "builtin"
    done = python("launch/prepare_data.py", "--builtin", 400, "--vocab-size", 512, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def config(prepared: Path) -> Path:
    path = prepared.parent / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="session")
def finished(config: Path, prepared: Path) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = prepared.parent / "undisturbed"
    done = torchrun("launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={folder}")
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout and "CoE-2(2/8)+1" in done.stdout
    return folder
