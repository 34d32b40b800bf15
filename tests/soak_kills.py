"""Kills a run of two ranks again and again, and compares what it comes to with the run that nobody touched.

    python tests/soak_kills.py --kills 50 --output runs/soak

Four ways take turns at random moments: SIGKILL of one rank, SIGKILL of torchrun, SIGTERM of all, SIGKILL of a rank in
the midst of a save. After each the same command goes on. Exit status 0 if losses and weights are the same bit by bit,
no start was refused and no process was left over. No test of the suite: it takes 20 to 60 minutes.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from programs import TORCHRUN, Program, children, python
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from coe_megatron.checkpoint import listing
from coe_megatron.checkpoint.storage import Reader
from coe_megatron.run.metrics_log import read_metrics

KINDS = ("a rank", "torchrun", "SIGTERM of all", "inside a save")
SAVE_EVERY = 10
CONFIG = f"""
model: {{num_layers: 2, hidden_size: 64, num_attention_heads: 2, seq_length: 64, hidden_dropout: 0.1}}
moe: {{num_experts: 8, topk: 2, ffn_hidden_size: 64}}
data: {{validation_samples: 8}}
optimizer: {{lr: 3e-3}}
parallel: {{expert: 2}}
training: {{global_batch: 8, micro_batch: 4, log_every: 1, evaluate_every: 100, save_every: {SAVE_EVERY}}}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    config = options.output / "soak.yaml"
    config.write_text(CONFIG)
    data = options.output / "data"
    prepared = python("launch/prepare_data.py", "--builtin", 400, "--vocab-size", 512, "--output", data)
    assert prepared.returncode == 0, prepared.stderr
    steps = (options.kills + 2) * SAVE_EVERY

    def command(folder: str) -> list[str]:
        settings = (f"data.path={data}", f"output={options.output / folder}", f"training.steps={steps}")
        return [*TORCHRUN, "2", "launch/pretrain_coe.py", str(config), *settings]

    began = time.monotonic()
    with Program(command("untouched")) as process:
        assert process.wait() == 0
    seconds, draw, done = time.monotonic() - began, random.Random(options.seed), Counter[str]()
    began, trouble = time.monotonic(), list[str]()
    folder = options.output / "soaked"
    while done.total() < options.kills and not trouble:
        kind = KINDS[done.total() % len(KINDS)]
        trouble += killed_once(command("soaked"), folder, kind, draw)
        done[kind] += 1
        newest = listing.latest_complete(folder / "checkpoints")
        print(f"{done.total()} of {options.kills}: {kind}; newest checkpoint {newest and newest.name}", flush=True)
    if not trouble:
        with Program(command("soaked")) as process:
            if process.wait() != 0:
                trouble.append("the last start did not come to the end")
        trouble += differences(options.output / "untouched", folder)
    starts = len(json.loads((folder / "run.json").read_text())["attempts"])
    print(f"{steps} steps; kills: {dict(done)}; starts: {starts}; untouched {seconds:.0f} s, soaked "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    print("\n".join(trouble) or "losses and weights are the same bit by bit; runs lost: 0")
    return bool(trouble)


def killed_once(command: list[str], folder: Path, kind: str, draw: random.Random) -> list[str]:
    """Start, kill when there is new progress, wait until all is gone; what went wrong."""
    with Program(command) as process:
        began = _steps(folder)
        goal = began + draw.randint(1, SAVE_EVERY)
        while process.poll() is None and not (_saving(folder) if kind == "inside a save" else _steps(folder) >= goal):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        ranks = children(process)
        if process.poll() is not None or len(ranks) != 2:
            return [f"before {kind}: the run ended by itself with {process.poll()}"]
        for pid, number in _targets(kind, process.pid, ranks, draw):
            os.kill(pid, number)
        process.wait(timeout=120)
        deadline = time.monotonic() + 60
        while alive := [rank for rank in ranks if Path(f"/proc/{rank}").exists()]:
            if time.monotonic() > deadline:
                return [f"after {kind}: processes {alive} were left over"]
            time.sleep(0.05)
    return []


def _targets(kind: str, torchrun: int, ranks: list[int], draw: random.Random) -> list[tuple[int, int]]:
    if kind == "torchrun":
        return [(torchrun, signal.SIGKILL)]
    if kind == "SIGTERM of all":
        return [(pid, signal.SIGTERM) for pid in (torchrun, *ranks)]
    return [(draw.choice(ranks), signal.SIGKILL)]


def _steps(folder: Path) -> int:
    lines = read_metrics(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def _saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.tmp"))


def differences(untouched: Path, soaked: Path) -> list[str]:
    """What the two runs do not have in common: logged losses, and every tensor of the last checkpoint."""
    found = []
    curves = [
        [(line["step"], line.get("train_loss"), line.get("valid_loss")) for line in read_metrics(run / "metrics.jsonl")]
        for run in (untouched, soaked)
    ]
    if curves[0] != curves[1]:
        found.append("the losses differ")
    mine, other = (_tensors(listing.find(run)) for run in (untouched, soaked))
    if mine.keys() != other.keys() or not all(torch.equal(mine[name], other[name]) for name in mine):
        found.append("the tensors of the last checkpoint differ")
    return found


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = Reader(checkpoint / "tensors")
    listed = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in listed.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader)
    return state


if __name__ == "__main__":
    sys.exit(main())
