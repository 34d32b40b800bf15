"""Times pretraining steps over slow cables, and counts their collectives; variants of a config take turns.

Hosts are network namespaces of this machine (benchmarks/cables.py): that needs root, and Debian's iproute2. Without
options, two hosts with one rank each, 2 ms and 200 Mbit/s between them, train a tiny CoE-2 with expert parallelism
over all ranks. The table has seconds per step (minimum and median of all steps on rank 0, without logging) with their
ratios to the first variant, the collectives of a step, and the largest difference of a loss from the first variant's.
"KB sent" is what rank 0 hands to others by the shortest way, "KB by host" what its host's interface has counted.

    python benchmarks/bench_dispatch.py
    python benchmarks/bench_dispatch.py --variant moe.dispatcher=alltoall --variant "moe.dispatcher=allgather"
    python benchmarks/bench_dispatch.py --hosts 4 --delay-ms 0.5 --rate-mbit 1000 training.global_batch=32

Exit status: 0 done, 1 hosts cannot be made here or a rank failed, 2 a bad argument, 130 interrupted from the keyboard.
"""

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_options
from bench_options import positive
from cables import Network, unable

from coe_megatron.cli.arguments import Parser, write_out
from coe_megatron.config import RunConfig
from coe_megatron.config.load import load
from coe_megatron.errors import one_line
from coe_megatron.files import user_path
from coe_megatron.text import aligned

CONFIG = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 32, hidden_dropout: 0.1}
moe: {num_experts: 8, topk: 2, ffn_hidden_size: 16}
data: {validation_samples: 8}
optimizer: {lr: 3e-3}
training: {global_batch: 16, micro_batch: 4}
"""
TODAY = "moe.dispatcher=alltoall"
VOCABULARY = 512
WARM_UP = 3  # steps before the timed ones; the first is slow, since its memory is measured
_KILOBYTE = 1000


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print; returns the exit status."""
    parser = bench_options.parser("bench_dispatch.py", __doc__)
    parser.add_argument("overrides", nargs="*", default=[], help="key.sub=value, for all variants")
    parser.add_argument("--config", type=user_path, metavar="FILE", help="(default: a tiny CoE-2 and built-in data)")
    variant = "key.sub=value of one variant, separated by spaces; may be repeated (default: today's dispatch)"
    parser.add_argument("--variant", action="append", metavar="OVERRIDES", help=variant)
    parser.add_argument("--hosts", type=positive, default=2, metavar="N", help="(default: 2; 1 has no network)")
    parser.add_argument("--ranks-per-host", type=positive, default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--expert", type=positive, metavar="N", help="expert parallel size (default: all ranks)")
    parser.add_argument("--delay-ms", type=_number, default=2.0, metavar="MS", help="one way, 0 for none (default: 2)")
    parser.add_argument("--rate-mbit", type=_number, default=200.0, metavar="R", help="0: no limit (default: 200)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="turns of each variant (default: 5)")
    parser.add_argument("--steps", type=positive, default=10, metavar="N", help="timed steps per turn (default: 10)")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)  # what each rank is given: its plan
    return bench_options.run(parser, measure, arguments)


def _number(text: str) -> float:
    value = -1.0
    with suppress(ValueError):
        value = float(text)
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1000000")
    return value


def measure(options: argparse.Namespace, parser: Parser) -> int:
    if options.rank:
        return _run_rank(options.rank)
    folder = Path(tempfile.mkdtemp())
    names = options.variant or [TODAY]
    configs = [_config(options, name, folder / f"run{number}") for number, name in enumerate(names)]
    if any(config.parallel != configs[0].parallel for config in configs):
        parser.error("--variant changes parallel: all variants share their process groups")
    if reason := unable():
        print(f"error: hosts cannot be made of network namespaces here: {one_line(reason)}", file=sys.stderr)
        return 1
    if options.config is None:
        prepare(folder / "data")
    results = _run(options, configs, folder)
    if results is None:
        print("error: a rank failed", file=sys.stderr)
        return 1
    variants = [{"variant": name, **_summary(result)} for name, result in zip(names, results, strict=True)]
    for variant in variants:
        variant["ratio"] = {kind: variant[kind] / variants[0][kind] for kind in ("minimum", "median")}
        pairs = zip(variant["losses"], variants[0]["losses"], strict=True)
        variant["loss_difference"] = max(abs(own - first) for own, first in pairs)
    write_out(_conditions(options, configs[0]))
    write_out("\n".join(_times(variants)))
    for variant in variants:
        write_out("\n".join(_collectives(variant)))
    chosen = {name: value for name, value in vars(options).items() if name not in ("json", "config", "variant")}
    bench_options.write(options.json, {"options": chosen, "variants": variants})
    return 0


def _run_rank(plan: Path) -> int:
    _quiet_megatron()
    from dispatch_steps import run_rank

    run_rank(json.loads(plan.read_text()))
    return 0


def _quiet_megatron() -> None:
    from coe_megatron.lean_imports import import_megatron
    from coe_megatron.training.console import quiet_libraries

    quiet_libraries()
    import_megatron()


def _config(options: argparse.Namespace, variant: str, output: Path) -> RunConfig:
    """The config of a variant."""
    data, path = output.parent / "data", options.config or output.parent / "config.yaml"
    if options.config is None:
        path.write_text(CONFIG)
    ranks = options.hosts * options.ranks_per_host
    own = [
        *timed_only(options.rounds * options.steps),
        f"output={output}",
        f"parallel.expert={options.expert or ranks}",
    ]
    own += [] if options.config else [f"data.path={data}"]
    return load(path, [*own, *options.overrides, *variant.split()], ranks)


def timed_only(steps: int) -> list[str]:
    """Overrides: no step is logged, evaluated or saved, but for one after the first ones and so many timed ones."""
    last = WARM_UP + steps + 1
    every = {"log_every": last, "evaluate_every": last + 1, "save_every": last + 1, "steps": last + 1}
    return [f"training.{name}={value}" for name, value in every.items()]


def prepare(folder: Path) -> None:
    """Tokens of the built-in corpus."""
    _quiet_megatron()
    from coe_megatron.data.prepare import prepare
    from coe_megatron.data.prepare_settings import PrepareSettings

    prepare(PrepareSettings(folder, builtin=400, vocab_size=VOCABULARY))


def _run(options: argparse.Namespace, configs: list[RunConfig], folder: Path) -> list[dict[str, Any]] | None:
    """What rank 0 has measured, by variant; None if a rank failed, which has then said why."""
    plan, result = folder / "plan.json", folder / "result.json"
    asked = {name: getattr(options, name) for name in ("rounds", "steps", "clock")}
    written = {"configs": [asdict(config) for config in configs], "warm_up": WARM_UP, "result": str(result), **asked}
    plan.write_text(json.dumps(written))
    with Network([cable(options.delay_ms, options.rate_mbit)] * options.hosts, folder / "shell") as network:
        network.run([sys.executable, __file__, "--rank", str(plan)], options.ranks_per_host)
    return json.loads(result.read_text()) if result.exists() else None


def cable(delay_ms: float, rate_mbit: float) -> str:
    """What netem is told: a frame passes two cables, each with half the delay."""
    delay = [f"delay {delay_ms / 2:g}ms"] if delay_ms else []
    return " ".join([*delay, *([f"rate {rate_mbit:g}mbit"] if rate_mbit else [])])


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    steps = [seconds for turn in result["seconds"] for seconds in turn]
    return {"minimum": min(steps), "median": statistics.median(steps), **result}


def _conditions(options: argparse.Namespace, config: RunConfig) -> str:
    place = f"{options.hosts} x {options.ranks_per_host} ranks, EP {config.parallel.expert}"
    cable = f"{options.delay_ms:g} ms one way, {options.rate_mbit:g} Mbit/s" if options.hosts > 1 else "no network"
    return f"{place}, {cable}; {options.rounds} turns of {options.steps} steps, {options.clock} time"


def _times(variants: list[dict[str, Any]]) -> list[str]:
    counted = ("calls", "waited for", "KB sent")
    rows = [("variant", "min s", "median s", "ratio min/median", *counted, "KB by host", "losses differ")]
    for each in variants:
        ratio = each["ratio"]
        times = (f"{each['minimum']:.3f}", f"{each['median']:.3f}", f"{ratio['minimum']:.2f}/{ratio['median']:.2f}")
        of_host = f"{each['sent_by_host'] / _KILOBYTE:.1f}"
        rows.append((each["variant"], *times, *_counts(each["step"]), of_host, f"{each['loss_difference']:.1g}"))
    return aligned(rows)


def _collectives(variant: dict[str, Any]) -> list[str]:
    """By purpose and kind, in the order in which a step makes them; then those of logging it."""
    rows = [("", "kind", "calls", "waited for", "KB sent")]
    for part, prefix in (("step", ""), ("log", "when logged: ")):
        calls: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for call in variant[part]:
            calls.setdefault((prefix + call["purpose"], call["kind"]), []).append(call)
        rows += [(*which, *_counts(found)) for which, found in calls.items()]
    return ["", variant["variant"], *aligned(rows, "<<>")]


def _counts(calls: list[dict[str, Any]]) -> tuple[str, str, str]:
    waits, sent = sum(call["waits"] for call in calls), sum(call["sent"] for call in calls)
    return str(len(calls)), str(waits), f"{sent / _KILOBYTE:.1f}"


if __name__ == "__main__":
    sys.exit(main())
