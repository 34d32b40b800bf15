"""The GPU day: what holds on this machine's first CUDA device, in eight minutes at most.

    make gpu
    python benchmarks/gpu_day.py --only layers      # one part again

The parts are the GPU tier, layers and steps against Megatron's own, kernels, parity with the CPU, and the paper's arms.
Each is a process with a time limit; one that fails or takes too long is reported, and the next goes on. report.json and
report.md in the output folder are written anew after each part. On a real device the README's table "verified on" gets
its row if the GPU tier has passed.

Exit status: 0 all parts done; 1 a part failed; 2 a bad argument, or no CUDA device; 130 interrupted from the keyboard.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from contextlib import nullcontext, suppress
from datetime import date
from pathlib import Path
from typing import Any

import gpu_page
from bench_options import positive

from coe_megatron import scratch
from coe_megatron.cli.arguments import Parser, write_out
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import kind_of, problem, require_folder, user_path, write_atomically
from coe_megatron.launcher.preloaded import Popen, Preloaded, is_loaded
from coe_megatron.lean_imports import import_megatron

ROOT = Path(__file__).resolve().parents[1]
PARTS = {  # in this order, with their seconds at most; the arms that fit into what is left come last
    "tier": 130,
    "layers": 45,
    "layers_te": 40,  # with Transformer Engine alone
    "steps": 60,
    "steps_te": 45,
    "kernels": 40,
    "parity": 60,
    "arms": 300,
}
_DRAWING = 10  # seconds kept for the last page
_START = 20  # seconds that a part may take to begin and to end
_QUICK = 3  # times as long for small sizes: a machine without a device is slow, and may be busy
_SHORTEST = 15  # a part with less time is not begun
PROGRAM = str(Path(__file__).resolve())
OUTPUT, JSON, LOGS = "gpu-report", "report.json", "logs"


def main(arguments: list[str] | None = None) -> int:
    """Parse, run the parts, write the report; returns the exit status."""
    parser = Parser(prog="gpu_day.py", description=__doc__)
    parser.add_argument("--output", type=user_path, default=Path(OUTPUT), help="folder of the report")
    parser.add_argument("--seconds", type=positive, default=480, help="time of all parts together (default: 480)")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a rehearsal: times mean nothing")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help=f"of {', '.join(PARTS)}; of the others the report keeps what it has",
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what the process of a part is asked for
    options = parser.parse_args(arguments)
    try:
        scratch.enter()
        if kind_of(options.output, "--output") is not None:
            require_folder(options.output, "--output")
        _require_device()
        _make(options.output / LOGS)
    except ConfigError as error:
        parser.error(str(error))
    run = run_here if options.part else run_all
    try:
        return run(Report(options.output), options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _require_device() -> None:
    import torch  # takes seconds

    if not torch.cuda.is_available():
        raise ConfigError("no CUDA device: torch.cuda.is_available() is False, and the GPU day needs one")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise problem(folder, "--output", error) from None


class Report:
    """report.json, which the process of a part and the one that started it write in turn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict[str, Any]:
        with suppress(FileNotFoundError, ValueError):
            return json.loads((self.folder / JSON).read_text())
        return {"parts": {}}

    def update(self, part: str | None = None, **values: Any) -> dict[str, Any]:
        """Set values of a part, or of the report; returns all of it."""
        report = self.read()
        (report if part is None else report["parts"].setdefault(part, {})).update(values)
        write_atomically(self.folder / JSON, json.dumps(report, indent=1) + "\n")
        return report


def run_all(report: Report, options: argparse.Namespace) -> int:
    """Every part in its process; returns the exit status."""
    start = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    kept = report.read()["parts"] if options.only else {}
    report.update(parts=kept, date=date.today().isoformat(), quick=options.quick, machine=None)
    statuses: list[str] = []
    # In a rehearsal this process is a fork of one that pretends a device, and so have parts to be.
    with Preloaded() if is_loaded() else nullcontext() as preloaded:
        for part in options.only or PARTS:
            left = options.seconds - _DRAWING - (time.monotonic() - start)
            limit = PARTS[part] * (_QUICK if options.quick else 1)
            values = _run(part, min(limit, left), options, preloaded)
            statuses.append(values["status"])
            remark = f": {values['error']}" if values["error"] else ""
            write_out(f"{part}: {values['status']} in {values['seconds']:.0f} s{remark}")
            try:
                gpu_page.write(report.update(part, **values), report.folder)
            except Exception:  # the numbers are in report.json, and the next part goes on
                traceback.print_exc()
                statuses.append("failed")
            if "interrupted" in statuses:
                break
    write_out(f"{time.monotonic() - start:.0f} s in all; the report is {report.folder / gpu_page.PAGE}")
    fill_readme(report, options)
    return 130 if "interrupted" in statuses else 1 if "failed" in statuses else 0


def _run(part: str, limit: float, options: argparse.Namespace, preloaded: Preloaded | None) -> dict[str, Any]:
    """Run a part in a process; returns its `status`, `seconds` and `error`, a line that is empty if it is done."""
    from coe_megatron.local_backend.megatron_compat import has_transformer_engine  # imports torch

    if part.endswith("_te") and not has_transformer_engine():
        return {"status": "skipped", "seconds": 0.0, "error": "Transformer Engine is not installed"}
    if limit < _SHORTEST:
        return {"status": "failed", "seconds": 0.0, "error": "no time was left"}
    write_out(f"{part}: at most {limit:.0f} s")
    start, output = time.monotonic(), options.output.resolve()
    log = output / LOGS / f"{part}.txt"
    command = [sys.executable, PROGRAM, "--part", part, "--output", str(output), "--seconds", str(int(limit))]
    with log.open("w") as file:
        process = Popen(
            [*command, *["--quick"] * options.quick], preloaded, cwd=ROOT, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            status = "failed" if code else "done"
            error = (f"exit status {code}: " if code != 1 else "") + _last_line(log) if code else ""
        except subprocess.TimeoutExpired:
            status, error = "failed", f"it took more than {limit:.0f} s"
        except KeyboardInterrupt:
            status, error = "interrupted", ""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            process.wait()
    return {"status": status, "seconds": time.monotonic() - start, "error": error}


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return one_line(next((line for line in reversed(lines) if line.strip()), "it wrote nothing"))[:300]


def run_here(report: Report, options: argparse.Namespace) -> int:
    """One part in this process, for the one that started it."""
    from coe_megatron.training.console import quiet_libraries

    quiet_libraries()
    import_megatron()
    import gpu_parts

    report.update(machine=gpu_parts.facts())
    seconds = max(options.seconds - _START, 1)
    task = gpu_parts.Task(options.quick, seconds, lambda results: report.update(options.part, results=results))
    try:
        getattr(gpu_parts, options.part)(task)
    except gpu_parts.PartFailed as error:
        print(error, file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()
        print(gpu_parts.summary(error), file=sys.stderr)  # the last line, which the report has
        return 1
    return 0


def fill_readme(report: Report, options: argparse.Namespace) -> None:
    """Add the device's rows to the README's table "verified on", or say why not."""
    found, readme = report.read(), ROOT / "README.md"
    tier = found["parts"].get("tier", {}).get("status")
    if found["machine"] is None or found["machine"]["pretended"]:
        missing = "no GPU ran this"
    elif options.quick or options.only or report.folder.resolve() != ROOT / OUTPUT:
        missing = f"that takes all parts and sizes, and the report in {OUTPUT}"
    elif tier != "done":
        missing = "the GPU tier has not passed"
    else:
        write_atomically(readme, verified_on(readme.read_text(), found))
        return
    write_out(f"README.md gets no row: {missing}")


def verified_on(text: str, report: dict[str, Any]) -> str:
    """The README with rows for this report: instead of those of the same device and release, or of "none yet"."""
    machine, tests = report["machine"], report["parts"]["tier"]["results"]["passed"]
    place = f"{machine['device']}, Python {machine['python'].rpartition('.')[0]}"
    versions = [machine[name] for name in ("cuda", "torch", "megatron_core", "deepspeed")]
    rows = {"NVIDIA GPU (NCCL)": f"{place}: [{len(tests)} GPU tests]({OUTPUT}/{gpu_page.PAGE})"}
    if machine["transformer_engine"] and (with_te := [name for name in tests if "transformer_engine" in name]):
        engine = f"Transformer Engine {machine['transformer_engine']}"
        rows["Transformer Engine"] = f"{engine}, {place}: {len(with_te)} tests"
    before, table, after = re.split(r"(^\| verified on .*\n(?:\|.*\n)+)", text, maxsplit=1, flags=re.MULTILINE)
    for none_yet, cell in rows.items():
        old = rf"^\| (?:{re.escape(none_yet)}.*none yet|{re.escape(cell.partition(':')[0])}:).*\n"
        table = re.sub(old, "", table, flags=re.MULTILINE)
        table += f"| {' | '.join([cell, *versions])} | | {report['date']} |\n"
    return before + table + after


if __name__ == "__main__":
    sys.exit(main())
