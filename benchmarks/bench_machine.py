"""Measures this node and its links in about two minutes, and writes a machine file for `coe-pretrain --machine`.

Matrix products by shape and precision, elementwise operations by size, what the host needs for an operation and for a
step, the optimizer, memory and disk, and collectives by kind, size and group. Without a launcher as many processes
start here as there are GPUs or cores; with one of yours, which starts a process for each device, links between nodes
are measured too. If there are more processes than cores, only as many work at the same time, but all of them send.
Prices, peaks, adapters, what failures cost, and links that there are not here, are those of --base.

    python benchmarks/bench_machine.py node.yaml
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        benchmarks/bench_machine.py cluster.yaml

Exit status: 0 done, 1 a process failed, 2 a bad argument, 130 interrupted from the keyboard.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import bench_options
from bench_options import positive

from coe_megatron import parsing
from coe_megatron.cli.arguments import Parser, write_out
from coe_megatron.cli.estimates import machine_of
from coe_megatron.config.load import parse, parse_as
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.machine import Machine, machine, machines
from coe_megatron.estimate.operations import Rank
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.step_time import step_time
from coe_megatron.files import problem, require_writable, user_path, write_atomically

_TINY: dict[str, dict[str, Any]] = {
    "model": {"hidden_size": 16, "num_attention_heads": 2, "seq_length": 8, "vocab_size": 64},
    "moe": {"num_experts": 4, "topk": 2, "ffn_hidden_size": 8},
    "training": {"global_batch": 1, "micro_batch": 1, "precision": "fp32"},
}
_SMALL: dict[str, dict[str, Any]] = {
    "model": {"hidden_size": 128, "num_attention_heads": 4, "seq_length": 64, "vocab_size": 64},
    "moe": {"num_experts": 8, "topk": 2, "ffn_hidden_size": 128},
    "training": {"global_batch": 4, "micro_batch": 4, "precision": "fp32"},
}
_MODELS = {"tiny": _TINY, "small": _SMALL}
_LAYERS = (8, 2)  # of two models whose steps tell what the host needs
_STEPS = 30
_PATIENCE = timedelta(minutes=30)


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, write; returns the exit status."""
    parser = Parser(prog="bench_machine.py", description=__doc__)
    parser.add_argument("file", type=user_path, help="the machine file to write")
    parser.add_argument("--base", metavar="MACHINE", help="a machine file or name (default: that of the device)")
    parser.add_argument("--description", help="one line (default: the devices of a node)")
    parser.add_argument("--links", action="store_true", help="measure collectives only; the rest is that of --base")
    parser.add_argument("--ranks", type=positive, metavar="N", help="processes here (default: one for a GPU or core)")
    parser.add_argument("--host", type=Path, help=argparse.SUPPRESS)  # the process that measures steps, and its result
    return bench_options.run(parser, measure, arguments)


def measure(options: argparse.Namespace, parser: Parser) -> int:
    if options.host:
        options.host.write_text(json.dumps(_of_steps()))
        return 0
    require_writable(options.file, "FILE", "file")
    import torch

    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    base = _base(options.base, kind)
    if "RANK" not in os.environ:
        ranks = options.ranks or torch.cuda.device_count() or os.cpu_count()
        own = [f"--{name}={value}" for name in ("base", "description") if (value := getattr(options, name)) is not None]
        own += ["--links"] if options.links else []
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run([*launcher, __file__, str(options.file), *own], check=False, env=_environment(kind))
        return int(done.returncode != 0)
    return _measure_together(options, base, kind)


def _environment(kind: str) -> dict[str, str]:
    return {**os.environ, **({"OMP_NUM_THREADS": "1"} if kind == "cpu" else {}), "TORCH_CPP_LOG_LEVEL": "ERROR"}


def _base(name: str | None, kind: str) -> Machine:
    if name is not None:
        return machine_of(name, "--base")
    for each in machines():
        if (found := machine(each)).device in kind:
            return found
    raise ConfigError(f"--base must be given for {kind}: one of {', '.join(machines())}, or a machine file")


def _measure_together(options: argparse.Namespace, base: Machine, kind: str) -> int:
    import torch
    import torch.distributed as dist
    from machine_times import Bench

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", local)
    if kind != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl", timeout=_PATIENCE)
    bench = Bench(device)
    if rank == 0:
        options.file.parent.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    works = kind != "cpu" or local < (os.cpu_count() or 1)
    found = _of_rank(bench, options.file, base) if works and not options.links else {}
    dist.barrier()
    found |= _links(bench, base)
    if rank == 0:
        found |= {"description": options.description or f"{os.environ['LOCAL_WORLD_SIZE']} ranks on {_processor(kind)}"}
        _write(options.file, asdict(base) | found)
    dist.destroy_process_group()
    return 0


def _processor(kind: str) -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if kind == "cpu" and line.startswith("model name"):
                return f"{os.cpu_count()} cores of {line.partition(':')[2].strip()}"
    return kind if kind != "cpu" else f"{os.cpu_count()} cores"


def _of_rank(bench: Any, file: Path, base: Machine) -> dict[str, Any]:
    """What each rank measures while the others do the same; the first one's numbers count."""
    import torch

    on_cpu = bench.device.type == "cpu"
    found: dict[str, Any] = {"device": "cpu" if on_cpu else torch.cuda.get_device_name(bench.device)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        _say(f"matrix products in {name}")
        peak = asdict(getattr(base, name))["peak"] if base.device in found["device"] else None
        found[name] = {"peak": peak, "products": bench.rates(dtype, False), "grouped": bench.rates(dtype, True)}
    _say("elementwise operations, host and disk")
    free = None if on_cpu else float(torch.cuda.mem_get_info(bench.device)[1])
    found["memory"] = bench.memory() | {"capacity": free}
    host = {"operation": 0.0, "step": 0.0, "is_asynchronous": not on_cpu, "wait": bench.wait()}
    found["host"] = host | {"transfer": bench.transfer(), "update": bench.update()}
    is_first = os.environ["RANK"] == "0"
    if on_cpu or is_first:
        found["host"] |= _host(file, parse_as(Machine, asdict(base) | found))
    found["disk"] = bench.disk(file.parent) if is_first else {}
    found["measured"] = f"{datetime.now(UTC):%Y-%m-%d} on {platform.node()}"
    return found


def _host(file: Path, found: Machine) -> dict[str, float]:
    """Seconds of an operation and of a step, from training steps of models in a process of its own.

    Between operations that do some work, which empties the host's caches, the host needs longer for one than between
    those of tiny tensors.

    Args:
        found: what is measured already, with a host that needs no time.
    """
    _say("steps of small models")
    result = file.with_suffix(f".steps-{os.environ['RANK']}")
    launchers = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    alone = {name: value for name, value in os.environ.items() if not name.endswith(launchers)}
    try:
        subprocess.run([sys.executable, __file__, str(file), "--host", str(result)], check=True, env=alone)
        seconds = json.loads(result.read_text())
    finally:
        result.unlink(missing_ok=True)
    (tiny, operations), (small, _) = (_of_layers(given, seconds[name], found) for name, given in _MODELS.items())
    step = seconds["tiny"][1] - tiny * operations
    return {"operation": tiny if found.host.is_asynchronous else max(tiny, small), "step": max(0.0, step)}


def _of_layers(given: dict[str, Any], seconds: list[float], found: Machine) -> tuple[float, float]:
    """Seconds of an operation, from steps with many and few layers, less the work predicted; operations of few."""
    runs = [_run(given, layers) for layers in _LAYERS]
    works = given is _SMALL  # what the tiny one does counts as the host's time
    many, few = (own - works * step_time(run, found).total for own, run in zip(seconds, runs, strict=True))
    counts = [
        sum(count * (work.forward.operations + work.backward.operations) for count, work, _ in parts)
        for parts in (Rank(run.stage_model(0), run.stage_pass(0)).parts() for run in runs)
    ]
    return max(0.0, many - few) / (counts[0] - counts[1]), counts[1]


def _of_steps() -> dict[str, list[float]]:
    """Seconds of a step of each model."""
    from step_times import time_steps

    from coe_megatron.distributed import process_groups

    first = _run(_TINY, _LAYERS[0]).config
    process_groups.start(first.parallel, first.training.seed)
    return {
        name: [time_steps(_run(given, layers).config, _STEPS)["seconds"]["median"] for layers in _LAYERS]
        for name, given in _MODELS.items()
    }


def _run(given: dict[str, Any], layers: int) -> RunShape:
    return RunShape.of(parse(given | {"model": given["model"] | {"num_layers": layers}}), 64, 1)


def _links(bench: Any, base: Machine) -> dict[str, Any]:
    """Ranks that share cores, and the collectives of all groups that a node, or all, can be divided into."""
    import torch.distributed as dist
    from machine_times import Calls

    world, ranks = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_cpu = bench.device.type == "cpu"
    calls = Calls(bench, ranks)
    cores = float(os.cpu_count() or 1) if on_cpu else None
    inside, across = (asdict(base)[name] for name in ("inside", "across"))
    if ranks > 1:
        _say("collectives inside a node")
        groups = [(size, 1) for size in _halves(ranks)]
        inside = calls.ways(groups, lambda sent: sent.inside_node * (ranks if on_cpu else 1))
    if world > ranks:
        _say("collectives between nodes")
        groups = [(world // ranks, ranks), *([(world, 1)] if ranks > 1 else [])]
        across = calls.ways(groups, lambda sent: sent.across_nodes * ranks / base.adapters)
    return {"cores": cores, "ranks_per_node": ranks, "inside": inside, "across": across}


def _halves(ranks: int) -> list[int]:
    return [ranks >> power for power in range(ranks.bit_length()) if ranks % 2**power == 0 and ranks >> power > 1]


def _say(what: str) -> None:
    if os.environ.get("RANK") == "0":
        print(f"{what} ...", file=sys.stderr, flush=True)


def _rounded(value: Any) -> Any:
    """With four digits: no measurement here has more."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _write(path: Path, values: dict[str, Any]) -> None:
    try:
        write_atomically(path, parsing.to_yaml(_rounded(values)))
    except OSError as error:
        raise problem(path, "FILE", error) from None
    write_out(f"{path}: {machine(str(path)).name}")


if __name__ == "__main__":
    sys.exit(main())
