"""A small study to change."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from small_study import BASE, STUDY

from coe_megatron.cli import study


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
