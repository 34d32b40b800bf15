"""Runs programs on the pretended CUDA device, forked from a process that has installed it and imported all."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import ROOT, TORCHRUN, kill

from coe_megatron.launcher.preloaded import TRAINING, Popen, Preloaded

HERE = Path(__file__).parent
SKIP = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here, so that none needs to be pretended")
BUILD = Path(torch.hub.get_dir()).parent / "pretend_cuda" / f"{sys.version_info.minor}-{torch.__version__}"


@cache
def pretended() -> Preloaded:
    BUILD.mkdir(parents=True, exist_ok=True)
    before = dict(os.environ)
    os.environ.pop("DS_ACCELERATOR", None)  # set by coe_megatron.zero in this process, which has no CUDA
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), before.get("PYTHONPATH", "")])
    os.environ["PRETEND_CUDA_BUILD"] = str(BUILD)
    try:
        return Preloaded(("pretended", *TRAINING, "step_waits"))
    finally:
        os.environ.clear()
        os.environ.update(before)


def rehearse(
    *arguments: object, ranks: int = 0, seconds: float = 300, on_cpu: bool = False, **environment: str
) -> tuple[int, str]:
    """`python ARGUMENTS`, or torchrun with `ranks`, on the pretended device or the CPU; exit status and output."""
    command = [*TORCHRUN, str(ranks)] if ranks else [sys.executable]
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    environment = {**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    process = Popen(
        [*command, *map(str, arguments)], None if on_cpu else pretended(), cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    with process:
        try:
            out = process.communicate(timeout=seconds)[0]
        finally:
            kill(process)
    return process.returncode, out


def notes(path: Path, rank: int = 0) -> dict[str, Any]:
    """What a rank noted by kind and line of source: all its waits as `syncs`, and those of each step as `steps`."""
    return json.loads(Path(f"{path}.{rank}").read_text())
