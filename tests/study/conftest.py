"""A small study to change."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from coe_megatron.cli import study

BASE = """\
output: nowhere
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 16, vocab_size: 64}
moe: {num_experts: 8, topk: 4, ffn_hidden_size: 16}
data: {path: nowhere, validation_samples: 8}
training: {steps: 100, global_batch: 4, micro_batch: 2, evaluate_every: 50, save_every: 100}
"""
STUDY: dict[str, Any] = {
    "base": "base.yaml",
    "output": "runs/small",
    "axes": {
        "design": {
            "MoE(4/8)": {"chain.iterations": 1, "moe.topk": 4},
            "CoE-2(2/8)": {"chain.iterations": 2, "moe.topk": 2},
        },
        "norm_placement": {"chain.norm_placement": ["prenorm", "iteration_norm"]},
    },
    "skip": [{"where": {"design": "MoE(4/8)", "norm_placement": "iteration_norm"}, "reason": "at C = 1 it is prenorm"}],
    "baseline": {"design": "MoE(4/8)", "norm_placement": "prenorm"},
    "seeds": [1, 2],
}


@pytest.fixture
def study_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes the small study with other keys, and its base; a key of None is left out."""

    def write(**changes: Any) -> Path:
        (tmp_path / "base.yaml").write_text(BASE)
        values = {key: value for key, value in (STUDY | changes).items() if value is not None}
        OmegaConf.save(OmegaConf.create(values), tmp_path / "study.yaml")
        return tmp_path / "study.yaml"

    return write


@pytest.fixture
def study_program(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """coe-study in this process: its exit status, and what it wrote to stdout and stderr."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = study.main(list(map(str, arguments)))
        except SystemExit as ended:
            status = ended.code
        written = capsys.readouterr()
        return int(status), written.out, written.err

    yield run
    for number, handler in before.items():  # which the program has made its own
        signal.signal(number, handler)
