"""Holds predicted times of steps against measured ones, layout by layout, on one host and over slow cables.

For each network the links are measured (bench_machine.py) by as many ranks as then train, and the rest by as many as
there are cores, or one rank if it trains alone; nothing else is fitted.
Predictions know the loads of experts that the run had. Hosts are network namespaces of this machine
(benchmarks/cables.py): that needs root, and Debian's iproute2. The table has the seconds of a step, measured (median)
and predicted, and its parts; then the median and the largest error, and the correlation of ranks.

    python benchmarks/bench_prediction.py --json times.json
    python benchmarks/bench_prediction.py --only "2 hosts"
    python benchmarks/bench_prediction.py --again times.json  # predicts what was measured, as the code does today

Exit status: 0 done, 1 hosts cannot be made here or a rank failed, 2 a bad argument, 130 interrupted from the keyboard.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import bench_options
from bench_dispatch import VOCABULARY, WARM_UP, cable, prepare, timed_only
from bench_options import positive
from cables import Network, unable
from scipy.stats import spearmanr

from coe_megatron.cli.arguments import Parser, write_out
from coe_megatron.config import RunConfig
from coe_megatron.config.load import load, parse_as
from coe_megatron.errors import one_line
from coe_megatron.estimate.load_imbalance import load_imbalance
from coe_megatron.estimate.machine import Machine, machine
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.step_time import step_time
from coe_megatron.files import problem, user_path
from coe_megatron.scale.search import Search
from coe_megatron.text import aligned, duration

DEFAULT = ""  # data parallelism alone, as whoever sets nothing gets it
_NOWHERE = ("output=none", "data.path=none")
_SIZES = ("tensor", "context", "pipeline", "virtual_pipeline", "expert", "expert_tensor")
HERE = Path(__file__).resolve().parent
CONFIG = """
model: {num_layers: 4, hidden_size: 256, num_attention_heads: 8, seq_length: 128, hidden_dropout: 0.0}
moe: {num_experts: 8, topk: 2, ffn_hidden_size: 256}
data: {validation_samples: 16}
optimizer: {lr: 3e-3}
training: {global_batch: 16, micro_batch: 2}
"""


@dataclass(frozen=True)
class Place:
    """Ranks on hosts with cables between them.

    Attributes:
        layouts: overrides of the config, separated by spaces.
    """

    hosts: int
    ranks_per_host: int
    delay_ms: float
    rate_mbit: float
    layouts: tuple[str, ...]

    @property
    def ranks(self) -> int:
        """On all hosts."""
        return self.hosts * self.ranks_per_host

    def __str__(self) -> str:
        ranks = f"{self.ranks_per_host} rank{'s' * (self.ranks_per_host > 1)}"
        if self.hosts == 1:
            return f"1 host, {ranks}"
        return f"{self.hosts} hosts of {ranks}, {self.rate_mbit:g} Mbit/s, {self.delay_ms:g} ms"


_ALONE = ("", "training.micro_batch=4", "chain.iterations=3", "chain.iterations=1 moe.topk=4", "moe.recompute=layer")
_TWO = (
    "parallel.expert=2",
    "parallel.expert=2 moe.dispatcher=deduplicated moe.overlap_chunks=2",
    "zero.stage=3",
    "parallel.tensor=2",
    "parallel.pipeline=2 training.micro_batch=1",
    "parallel.context=2",
)
OTHER_MODELS = {"chain.iterations=3", "chain.iterations=1"}
_FOUR = (
    "parallel.expert=4",
    "parallel.expert=2 zero.stage=2",
    "parallel.tensor=2 parallel.expert=2",
    "parallel.pipeline=2 parallel.expert=2 training.micro_batch=1",
    "parallel.expert=4 moe.dispatcher=deduplicated chain.iterations=3",
)
_EIGHT = (
    "parallel.expert=8",
    "parallel.expert=4 zero.stage=1",
    "parallel.pipeline=2 parallel.expert=4 training.micro_batch=1",
    "parallel.tensor=2 parallel.expert=4",
)
PLACES = (
    Place(1, 1, 0, 0, _ALONE),
    Place(1, 2, 0, 0, _TWO),
    Place(1, 4, 0, 0, _FOUR),
    Place(1, 8, 0, 0, _EIGHT),
    Place(2, 1, 2, 200, _TWO),
    Place(2, 1, 5, 1000, _TWO),
    Place(2, 1, 0.1, 10_000, _TWO),
    Place(2, 2, 0.5, 1000, _FOUR),
    Place(4, 1, 1, 500, _FOUR),
    Place(4, 2, 0.5, 1000, _EIGHT),
)


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print; returns the exit status."""
    parser = bench_options.parser("bench_prediction.py", __doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="only places whose name contains this")
    parser.add_argument("--again", type=user_path, metavar="FILE", help="what --json wrote: measures nothing")
    parser.add_argument("--steps", type=positive, default=12, metavar="N", help="timed steps (default: 12)")
    return bench_options.run(parser, measure, arguments)


def measure(options: argparse.Namespace, parser: Parser) -> int:
    places = [place for place in PLACES if options.only in str(place)]
    if not places:
        parser.error(f"--only: no place has {options.only!r} in its name: {'; '.join(map(str, PLACES))}")
    if options.again is None and (reason := unable()):
        print(f"error: hosts cannot be made of network namespaces here: {one_line(reason)}", file=sys.stderr)
        return 1
    folder = Path(tempfile.mkdtemp())
    measured = _read(options.again) if options.again else None
    if measured is None:
        prepare(folder / "data")
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for number, place in enumerate(places, start=1):
        if measured is None:
            print(f"place {number}/{len(places)}: {place}", file=sys.stderr, flush=True)
            own = folder / str(number)
            own.mkdir()
            times = _measure(place, own, folder / "data", options.steps)
            if times is None:
                print("error: a rank failed", file=sys.stderr)
                return 1
        elif (times := measured.get(str(place))) is None:
            continue
        found[str(place)] = times
        of_place = [_predicted(place, folder, times["machine"], run) for run in times["runs"]]
        rows += of_place
        write_out("\n".join([*_table(place, of_place), *_choices(of_place, times["suggested"])]))
        bench_options.write(options.json, {"places": found, "rows": rows, "summary": summary(rows)})
    if not rows:
        parser.error("--again: no such place was measured")
    write_out("\n" + ", ".join(f"{name} {value:.3f}" for name, value in summary(rows).items()))
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text())["places"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise problem(path, "--again", f"it cannot be used ({error})") from None


def _measure_node(file: Path, ranks: int) -> bool:
    """Write the machine file of one host; returns whether all ranks did their part."""
    with Network([""], file.with_suffix(".shell")) as network:
        return network.run([sys.executable, str(HERE / "bench_machine.py"), str(file)], ranks)


def _measure(place: Place, folder: Path, data: Path, steps: int) -> dict[str, Any] | None:
    """The machine, and the steps and loads of each layout; None if a rank failed, which has then said why."""
    file, runs = folder / "machine.yaml", []
    ranks = min(place.ranks, os.cpu_count() or 1)
    node = folder.parent / f"node-{ranks}.yaml"
    if not node.exists() and not _measure_node(node, ranks):
        return None
    with Network([cable(place.delay_ms, place.rate_mbit)] * place.hosts, folder / "shell") as network:
        links = [str(HERE / "bench_machine.py"), str(file), "--base", str(node), "--links"]
        if not network.run([sys.executable, *links], place.ranks_per_host):
            return None
        found = machine(str(file))
        suggested = _suggested(place, folder, found)
        for number, layout in enumerate(dict.fromkeys([*place.layouts, DEFAULT, suggested])):
            own = [f"output={folder / f'run{number}'}", f"data.path={data}"]
            config = _config(place, layout, folder, [*timed_only(steps), *own])
            plan, result = folder / "plan.json", folder / f"result{number}.json"
            asked = {"warm_up": WARM_UP, "rounds": 1, "steps": steps, "clock": "wall", "result": str(result)}
            plan.write_text(json.dumps({"configs": [asdict(config)], **asked}))
            rank = [sys.executable, str(HERE / "bench_dispatch.py"), "--rank", str(plan)]
            if not network.run(rank, place.ranks_per_host):
                return None
            of_rank = json.loads(result.read_text())[0]
            runs.append({"layout": layout, "steps": of_rank["seconds"][0], "loads": of_rank["loads"]})
    return {"machine": asdict(found), "runs": runs, "suggested": suggested}


def _suggested(place: Place, folder: Path, found: Machine) -> str:
    """The layout that a search finds for the model of the benchmark, as overrides."""
    run = RunShape.of(_config(place, DEFAULT, folder, _NOWHERE), VOCABULARY, place.ranks)
    best = Search(run, _shared(found, place), math.inf).best(1).best[0].run.config
    sizes = {name: getattr(best.parallel, name) for name in _SIZES}
    moe = {name: getattr(best.moe, name) for name in ("dispatcher", "overlap_chunks", "recompute")}
    given = {f"parallel.{name}": size for name, size in sizes.items()} | {f"moe.{name}": moe[name] for name in moe}
    given |= {"zero.stage": best.zero.stage, "training.micro_batch": best.training.micro_batch}
    return " ".join(f"{name}={value}" for name, value in given.items())


def _shared(found: Machine, place: Place) -> Machine:
    """Of a host, which shares the cores of this machine."""
    return replace(found, cores=(found.cores or 1) / place.hosts)


def _predicted(place: Place, folder: Path, measured: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """A row: a layout's measured and predicted step."""
    found = _shared(parse_as(Machine, measured), place)
    shape = RunShape.of(_config(place, run["layout"], folder, _NOWHERE), VOCABULARY, place.ranks)
    predicted = step_time(shape, found, load_imbalance(run["loads"], shape.layout.expert))
    row = {"place": str(place), "layout": run["layout"], "measured": statistics.median(run["steps"])}
    return row | {"predicted": predicted.total, "parts": predicted.parts}


def _config(place: Place, layout: str, folder: Path, own: Sequence[str]) -> RunConfig:
    path = folder / "config.yaml"
    path.write_text(CONFIG)
    return load(path, [*own, f"parallel.ranks_per_node={place.ranks_per_host}", *layout.split()], place.ranks)


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median and largest error of predicted against measured times, and the correlation of their ranks."""
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in rows]
    found = {"median error": statistics.median(errors), "largest error": max(errors)}
    if len(rows) > 1:
        predicted, measured = ([row[name] for row in rows] for name in ("predicted", "measured"))
        found["correlation of ranks"] = float(spearmanr(predicted, measured).statistic)
    return found


def _choices(rows: list[dict[str, Any]], suggested: str) -> list[str]:
    """What the suggested layout and the default take, against the best one measured of the same model."""
    same = {row["layout"]: row["measured"] for row in rows if not set(row["layout"].split()) & OTHER_MODELS}
    best = min(same, key=lambda layout: same[layout])
    lines = [f"best: {best or 'default'}"]
    for name, layout in (("suggested", suggested), ("default", DEFAULT)):
        lines.append(f"{name}: {same[layout] / same[best] - 1:+.1%} ({layout or 'data parallelism'})")
    return lines


def _table(place: Place, rows: list[dict[str, Any]]) -> list[str]:
    lines = [("layout", "measured", "predicted", "error", "largest parts")]
    for row in rows:
        parts = sorted(row["parts"].items(), key=lambda part: -part[1])[:4]
        largest = ", ".join(f"{name} {seconds / row['predicted']:.0%}" for name, seconds in parts)
        error = f"{row['predicted'] / row['measured'] - 1:+.1%}"
        lines.append((row["layout"] or "-", duration(row["measured"]), duration(row["predicted"]), error, largest))
    return ["", str(place), *aligned(lines, "<>>><")]


if __name__ == "__main__":
    sys.exit(main())
