"""The parts of the GPU day. Each has a process of its own, and calls `write` with all its results when there are more.

Imported late by gpu_day.py, since these imports take seconds.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from bench_layer import Sizes, sized
from layer_times import DTYPES, Stock, machine, time_layers
from step_times import time_steps

from coe_megatron.config import RunConfig, load
from coe_megatron.distributed import process_groups
from coe_megatron.errors import one_line
from coe_megatron.local_backend.megatron_compat import has_transformer_engine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAPER = ROOT / "configs" / "paper"
MAIN_ARMS = ("coe-2_4-64", "moe_8-64")  # the others follow by name
SHAPES = (
    Sizes(hidden=1024, ffn=704, experts=64, topk=8, tokens=4096),  # the paper's, a micro-batch of its configs
    Sizes(hidden=1024, ffn=704, experts=64, topk=8, tokens=16384),
    Sizes(hidden=2048, ffn=1408, experts=64, topk=6, tokens=4096),
)
QUICK_SHAPES = (Sizes(hidden=64, ffn=32, experts=8, topk=4, tokens=64),)
_SMALL = ["model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=2", "model.vocab_size=512"]
_SMALL += ["model.seq_length=32", "moe.ffn_hidden_size=32", "training.global_batch=8", "training.micro_batch=4"]
_SMALL_MLA = ["kv_lora_rank=32", "qk_head_dim=16", "qk_pos_emb_head_dim=8", "v_head_dim=16"]
QUICK = [*_SMALL, *(f"model.mla.{each}" for each in _SMALL_MLA)]
PARITY = [*_SMALL, "parallel.expert=1", "moe.num_experts=16"]
PARITY_STEPS = 4
# Largest difference of a loss, relative to it. Not yet measured on a GPU.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
# Without Transformer Engine, which Megatron would call with tensors of the CPU.
_ON_CPU = """
import sys
sys.modules["transformer_engine"] = None
from pathlib import Path
import gpu_parts
gpu_parts.parity_on_cpu(Path(sys.argv[1]))
"""


class PartFailed(RuntimeError):
    """A part has a result that is not as it should be; the message is one line."""


def summary(error: Exception) -> str:
    """An error by its type and its first line."""
    return one_line(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")[:300]


@dataclass(frozen=True)
class Task:
    """What a part gets.

    Attributes:
        quick: small sizes, for a rehearsal.
        seconds: time that the part has.
        write: takes the part's results so far, for JSON.
    """

    quick: bool
    seconds: float
    write: Callable[[Any], object]


def facts() -> dict[str, Any]:
    """The device and the software that the results depend on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        **machine(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "cuda": torch.version.cuda,
        "pretended": "pretended" in properties.name,  # a device of tests/rehearsal
        "device_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "deepspeed": version("deepspeed"),
        "transformer_engine": version("transformer_engine") if has_transformer_engine() else None,
    }


def tier(task: Task) -> None:
    """The tests marked `gpu`; the quick tier leaves out those that run whole programs."""
    outcomes = _Outcomes(task.write)
    marked = "gpu and not run" if task.quick else "gpu"
    status = pytest.main(
        ["-m", marked, "-p", "no:cacheprovider", "--rootdir", str(ROOT), str(ROOT / "tests/gpu")], [outcomes]
    )
    failed = outcomes.tests["failed"]
    if status or not outcomes.tests["passed"]:
        raise PartFailed(
            f"{len(failed)} tests failed: {', '.join(failed)}" if failed else f"pytest ended with {status!r}"
        )


class _Outcomes:
    """A plugin of pytest that keeps the names of tests by outcome."""

    def __init__(self, write: Callable[[Any], object]) -> None:
        self.tests: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
        self._write = write

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tests[report.outcome].append(report.nodeid.rpartition("/")[2])
            self._write(self.tests)


def layers(task: Task, spec: Stock = "local") -> None:
    """A MoE sub-layer of Megatron's and ours, and a chain with as many expert choices, in bf16, all on one backend."""
    device = _start()
    found = []
    for sizes in QUICK_SHAPES if task.quick else SHAPES:
        shape = sized(sizes, sizes.ffn)
        (timed,) = time_layers(shape, 3 if task.quick else 20, [DTYPES["bf16"]], device, spec=spec)
        found.append(timed.as_dict())
        task.write(found)


def layers_te(task: Task) -> None:
    layers(task, "transformer_engine")


def steps(task: Task, stock: Stock = "local") -> None:
    """A training step of the paper's model with Megatron's MoE layers, with ours, and of the chain, on one backend."""
    _start()
    found: dict[str, Any] = {}
    for name, arm, layer in (("stock", "moe_8-64", stock), ("ours", "moe_8-64", None), ("coe", "coe-2_4-64", None)):
        found[name] = {"arm": arm, **time_steps(_paper(arm, task, stock), _count(task), layer)}
        task.write(found)


def steps_te(task: Task) -> None:
    steps(task, "transformer_engine")


def arms(task: Task) -> None:
    """Every arm of the paper that fits in the time; one that fails is reported, and the next goes on."""
    start, longest, found = time.monotonic(), 0.0, {}
    _start()
    others = sorted({path.stem for path in PAPER.glob("*.yaml")} - {"base", *MAIN_ARMS})
    for arm in (*MAIN_ARMS, *others):
        began = time.monotonic()
        if began - start + 1.5 * longest > task.seconds:
            found[arm] = {"left_out": "no time"}
        else:
            found[arm] = _arm(arm, task)
            longest = max(longest, time.monotonic() - began)
        task.write(found)
    if failed := [arm for arm, result in found.items() if "error" in result]:
        raise PartFailed(f"{len(failed)} arms failed: {', '.join(failed)}")


def _arm(arm: str, task: Task) -> dict[str, Any]:
    try:
        return time_steps(_paper(arm, task), _count(task))
    except Exception as error:
        return {"error": summary(error)}


def kernels(task: Task) -> None:
    """The kernels of one step of the main arm, heaviest first."""
    _start()
    task.write(time_steps(_paper(MAIN_ARMS[0], task), 1, profiled=True)["kernels"])


def parity(task: Task) -> None:
    """Losses of a small chain on the device and on the CPU, from the same weights and tokens."""
    with TemporaryDirectory() as folder:
        # DeepSpeed has set DS_ACCELERATOR for this process.
        own = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
        environment = {**own, "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, "-c", _ON_CPU, folder], cwd=HERE, env=environment, check=True)
        _start()
        found = {}
        for precision, tolerance in TOLERANCE.items():
            here = parity_losses(precision, Path(folder))
            there = torch.load(Path(folder) / f"{precision}.losses", weights_only=True)
            worst = max(abs(a - b) / abs(b) for a, b in zip(here, there, strict=True))
            found[precision] = {"device": here, "cpu": there, "worst": worst, "tolerance": tolerance}
            task.write(found)
    if wrong := [name for name, result in found.items() if not result["worst"] <= result["tolerance"]]:
        raise PartFailed(f"losses differ from the CPU's by more than the tolerance in {', '.join(wrong)}")


def parity_losses(precision: str, folder: Path) -> list[float]:
    """The losses of a few steps; the first process that asks for them leaves its weights in the folder."""
    config = load(ROOT / "configs" / "quickstart.yaml", [*PARITY, f"training.precision={precision}"], 1)
    return time_steps(config, PARITY_STEPS, weights=folder / f"{precision}.weights")["losses"]


def _start() -> torch.device:
    return process_groups.start(RunConfig().parallel, 1234, process_groups.DistributedEnv())


def _paper(arm: str, task: Task, backend: Stock = "local") -> RunConfig:
    return load(PAPER / f"{arm}.yaml", [*(QUICK if task.quick else []), f"model.backend={backend}"], 1)


def _count(task: Task) -> int:
    return 1 if task.quick else 5


def parity_on_cpu(folder: Path) -> None:
    """The CPU's side of `parity`."""
    _start()
    for precision in TOLERANCE:
        torch.save(parity_losses(precision, folder), folder / f"{precision}.losses")
