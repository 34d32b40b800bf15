"""Holds the predicted goodput of runs that are killed at random against the measured one.

A small run on one CPU rank is killed by SIGKILL after times from an exponential distribution, also while it starts,
and started again after a delay until its last checkpoint is complete. Three runs: saves in the foreground and in the
background at the interval that is predicted to be best, and saves that are too far apart. Before, between and after
these starts the same training is timed without kills, in time that does not count, so that other load on the machine
falls on both.

Steps take a quarter of a second, of which the process sleeps most, and the disk is a second slow (paced_run.py): so the
times depend less on what else the machine does.

From the seconds of a step, a start and a save alone coe_megatron/scale/failures.py predicts the goodput: the mean and
90 % of simulated runs, and one run with exactly the times of the kills ("replayed"), which leaves chance out. Seconds
are those "timed" without kills, or the "own" ones in the log of the killed run: what else the machine does changes them
and the run alike, so that the model's error is left.

    python benchmarks/bench_goodput.py --json goodput.json
    python benchmarks/bench_goodput.py --between 15 --minutes 8 --only background

Programs are forked from a process that has imported torch, so a start takes two seconds instead of ten. Exit status: 0
done, 1 a run failed, 2 a bad argument, 130 interrupted from the keyboard.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import bench_options
from attempt_log import Constants, Log, Losses
from bench_dispatch import prepare
from bench_options import positive

from coe_megatron.cli.arguments import Parser, write_out
from coe_megatron.estimate.machine import Failures
from coe_megatron.launcher.preloaded import TRAINING, Popen, Preloaded, without_gpu
from coe_megatron.scale.failures import Goodput, Job, best_interval, replay, simulate
from coe_megatron.text import aligned

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 2, seq_length: 64, hidden_dropout: 0.1}
moe: {num_experts: 8, topk: 2, ffn_hidden_size: 64}
data: {validation_samples: 4}
optimizer: {lr: 1e-3}
training: {global_batch: 4, micro_batch: 4, log_every: 1, evaluate_every: 1000000, keep_checkpoints: 1000}
"""
INTERVAL, STEPS = 20, 40  # of a run without kills: steps between saves and of a start
_BEFORE, _BETWEEN = 2, 3  # its starts before the first kill, and starts of the killed run between two of its own
_STEP, _WRITE = 0.25, 1.0  # seconds of a step, at least, and of a sleep while a checkpoint is written
_LONG = 0.8  # interval of saves that is too long, as a part of the time between kills


class RunFailedError(Exception):
    """A run ended by itself, before its last step."""


@dataclass(frozen=True)
class Soak:
    """A run to be killed."""

    name: str
    background: bool
    is_long: bool


SOAKS = (
    Soak("foreground", background=False, is_long=False),
    Soak("background", background=True, is_long=False),
    Soak("foreground, saved too rarely", background=False, is_long=True),
)


@dataclass
class Programs:
    """Starts runs in one folder each.

    Attributes:
        preloaded: they are forked from it; None starts new interpreters.
        number: of runs so far.
    """

    folder: Path
    preloaded: Preloaded | None
    number: int = 0

    def warm(self) -> None:
        """Until what is preloaded is."""
        self._wait(self._start(self.folder, 1, 1, False, "--help"), None)

    def untouched(self, background: bool) -> "Untouched":
        """A run to be timed without kills."""
        self.number += 1
        return Untouched(self, self.folder / f"run{self.number}", background)

    def killed(self, job: Job, kills: Iterator[float], delay: float, beside: "Untouched") -> Log:
        """A run that is killed so many seconds after each of its starts, and started again after a delay.

        Args:
            beside: is continued between some starts, in time that does not count.
        """
        self.number += 1
        output, processes, paused = self.folder / f"run{self.number}", list[tuple[float, float]](), 0.0
        done = output / "checkpoints" / f"step-{job.steps:08}" / "complete.json"
        while not done.exists():
            if processes and len(processes) % _BETWEEN == 0:
                paused -= time.time()
                beside.go_on()
                paused += time.time()
            time.sleep(delay if processes else 0)
            processes.append(self.run(output, job.steps, job.interval, beside.background, next(kills)))
            print(f"  start {len(processes)}: {processes[-1][1] - processes[-1][0]:.1f} s", file=sys.stderr, flush=True)
        return Log.read(output, processes, job.interval, beside.background, paused)

    def run(
        self, output: Path, steps: int, interval: int, background: bool, seconds: float | None = None
    ) -> tuple[float, float]:
        """When a start of a run began and ended, or was killed after so many seconds."""
        began = time.time()
        self._wait(self._start(output, steps, interval, background), seconds)
        return began, time.time()

    def _start(
        self, output: Path, steps: int, interval: int, background: bool, *options: str
    ) -> "subprocess.Popen[bytes]":
        settings = {"steps": steps, "save_every": interval, "background_saving": str(background).lower()}
        overrides = [f"training.{name}={value}" for name, value in settings.items()]
        program = [sys.executable, str(ROOT / "benchmarks" / "paced_run.py"), str(self.folder / "config.yaml")]
        with (self.folder / "stderr.txt").open("wb") as errors:
            return Popen(
                [*program, f"output={output}", f"data.path={self.folder / 'data'}", *overrides, *options],
                self.preloaded,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "COE_PACE": f"{_STEP} {_WRITE}"},
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def _wait(self, process: "subprocess.Popen[bytes]", seconds: float | None) -> None:
        """Until it has ended, or kill it and all that it started."""
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = 0
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status:
            lines = (self.folder / "stderr.txt").read_text(errors="replace").splitlines()
            raise RunFailedError(f"a run ended with status {status}: {lines[-1] if lines else 'it printed nothing'}")


@dataclass
class Untouched:
    """A run without kills, in several starts that are each asked for more steps."""

    programs: Programs
    output: Path
    background: bool
    processes: list[tuple[float, float]] = field(default_factory=list)

    def go_on(self) -> None:
        """One start more."""
        steps = STEPS * (1 + len(self.processes))
        self.processes.append(self.programs.run(self.output, steps, INTERVAL, self.background))

    def constants(self) -> Constants:
        """What its starts so far say."""
        return Constants.of([Log.read(self.output, self.processes, INTERVAL, self.background)])


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print; returns the exit status."""
    parser = bench_options.parser("bench_goodput.py", __doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs whose name contains this")
    parser.add_argument("--between", type=positive, default=20, metavar="S", help="mean time to a kill (default: 20)")
    parser.add_argument("--delay", type=positive, default=1, metavar="S", help="until the next start (default: 1)")
    about = "of each run as predicted, without the timings (default: 4)"
    parser.add_argument("--minutes", type=positive, default=4, metavar="M", help=about)
    parser.add_argument("--seed", type=positive, default=1, metavar="N", help="of the kills (default: 1)")
    return bench_options.run(parser, measure, arguments)


def measure(options: argparse.Namespace, parser: Parser) -> int:
    soaks = [soak for soak in SOAKS if options.only in soak.name]
    if not soaks:
        parser.error(f"--only: no run has {options.only!r} in its name: {'; '.join(soak.name for soak in SOAKS)}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(CONFIG)
        prepare(folder / "data")
        preloaded = Preloaded(TRAINING) if without_gpu() else None
        try:
            for row in _soaked(Programs(folder, preloaded), soaks, options):
                rows.append(row)
                write_out("\n".join(_table(row)))
                chosen = {name: getattr(options, name) for name in ("between", "delay", "minutes", "seed")}
                bench_options.write(options.json, {"options": chosen, "rows": rows})
        except RunFailedError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            if preloaded is not None:
                preloaded.close()
    return 0


def _soaked(programs: Programs, soaks: list[Soak], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each run."""
    failures = failing(options.between, options.delay)
    programs.warm()
    for number, soak in enumerate(soaks):
        print(f"run {number + 1}/{len(soaks)}: {soak.name}", file=sys.stderr, flush=True)
        untouched, seed = programs.untouched(soak.background), options.seed + number
        for _ in range(_BEFORE):
            untouched.go_on()
        job = planned(untouched.constants(), failures, soak, 60 * options.minutes)
        log = programs.killed(job, kills(seed, options.between), options.delay, untouched)
        untouched.go_on()
        yield compared(soak.name, log, untouched.constants(), failures, seed)


def planned(timed: Constants, failures: Failures, soak: Soak, seconds: float) -> Job:
    """The interval of saves, and the steps that are predicted to take so many seconds."""
    own = own_failures(timed, failures)
    steps = round(seconds / timed.step)
    long = round(_LONG * failures.between_failures / timed.step)
    job = timed.job(steps, long if soak.is_long else best_interval(timed.job(10 * steps, INTERVAL), own))
    return replace(job, steps=round(simulate(job, own).mean * steps))


def failing(between: float, delay: float) -> Failures:
    """One node that is killed so often; a kill is noticed at once, and the node is used again after a delay."""
    return Failures(
        between_failures=between,
        between_preemptions=None,
        notice=0.0,
        requeue=delay,
        start=0.0,
        warm_up=0.0,
        repair=0.0,
        spare_nodes=0,
        elastic=False,
    )


def own_failures(constants: Constants, failures: Failures) -> Failures:
    """With a start as it was timed."""
    return replace(failures, start=constants.start, warm_up=max(0.0, constants.warm_up))


def kills(seed: int, between: float) -> Iterator[float]:
    """Seconds after each start."""
    draw = random.Random(seed)
    while True:
        yield draw.expovariate(1 / between)


def compared(name: str, log: Log, timed: Constants, failures: Failures, seed: int) -> dict[str, Any]:
    """What was measured of a killed run, and what is predicted from timings without kills and from its own."""
    own, between, steps = Constants.of([log]), failures.between_failures, max(log.completed)
    measured = Losses.of(log, own.step)
    found, times = dict[str, Goodput](), {"timed": timed, "own": own}
    for which, constants in times.items():
        job, its_failures = constants.job(steps, log.interval), own_failures(constants, failures)
        found[f"simulated, {which} times"] = simulate(job, its_failures)
        found[f"replayed, {which} times"] = replay(job, its_failures, kills(seed, between))
    return {
        "name": name,
        "seed": seed,
        "between": between,
        "steps": steps,
        "interval": log.interval,
        "constants": {which: constants.as_dict() for which, constants in times.items()},
        "measured": asdict(measured),
        "predicted": {which: _as_dict(goodput, measured) for which, goodput in found.items()},
    }


def _as_dict(found: Goodput, measured: Losses) -> dict[str, Any]:
    range_ = [found.quantile(0.05), found.quantile(0.95)]
    values = {"goodput": found.mean, "range": range_, "failures": found.failures, "seconds": found.seconds}
    return values | {"lost": found.lost, "error": found.mean / measured.goodput - 1}


def _table(row: dict[str, Any]) -> list[str]:
    measured, steps = row["measured"], row["constants"]["timed"]["step"]
    lines: list[tuple[str, ...]] = [
        ("", "goodput", "90 % of runs", "error", "kills", "seconds", "saves", "down", "repeated")
    ]
    lines.append(("measured", f"{measured['goodput']:.1%}", "", "", *_parts(measured)))
    for which, each in row["predicted"].items():
        low, high = each["range"]
        range_ = f"{low:.1%} to {high:.1%}" if high > low else ""
        lines.append((which, f"{each['goodput']:.1%}", range_, f"{each['error']:+.1%}", *_parts(each)))
    head = f"{row['name']}: {row['steps']:,} steps of {steps * 1000:.0f} ms, saved every {row['interval']:,} steps"
    head += f", a kill after {row['between']:g} s on average, {measured['before_first_step']} before a first step"
    return ["", head, *aligned(lines, "<>>>>>>>>"), *_constants(row["constants"])]


def _parts(found: dict[str, Any]) -> tuple[str, ...]:
    lost = (f"{found['lost'][name] / found['seconds']:.1%}" for name in ("saves", "down", "repeated"))
    return (f"{found['failures']:.3g}", f"{found['seconds']:.0f}", *lost)


def _constants(found: dict[str, dict[str, float]]) -> list[str]:
    names = list(next(iter(found.values())))
    rows = [("seconds", *names)]
    rows += [(f"{which} times", *(f"{values[name]:.3f}" for name in names)) for which, values in found.items()]
    return aligned(rows, "<" + ">" * len(names))


if __name__ == "__main__":
    sys.exit(main())
