"""Runs a study on this host, one run after another or several in parallel on its devices; skips finished runs."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

from coe_megatron.config.layout import layout
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import as_argument, kind_of, require_file, require_writable
from coe_megatron.launcher.preloaded import PICTURES, TRAINING, Popen, Preloaded, without_gpu
from coe_megatron.launcher.torchrun_supervisor import Requests
from coe_megatron.run.exit_status import ExitStatus, known_status
from coe_megatron.run.lock import is_held
from coe_megatron.run.status import Status, status
from coe_megatron.study.plan.arms import Run
from coe_megatron.study.plan.past_runs import difference, used_settings
from coe_megatron.study.run.paths import log_of, write_config
from coe_megatron.text import format_duration, shortened

_POLL_SECONDS = 0.2
_ATTEMPT_LINE = "study.py begins: "  # starts the first line of every attempt in a run's log
_ERROR_LINE = re.compile(r"coe-[\w-]+: (?:error|ended with status \d+ \((?!STOPPED)\w+\), rank \d+): (.*)")
_LOG_TAIL = 1 << 20  # bytes at the end of a log that are searched for an error
_DEVICE = re.compile(r"0|[1-9][0-9]{0,3}|(GPU|MIG)-[0-9A-Za-z/-]+", re.ASCII)  # in CUDA_VISIBLE_DEVICES
_NO_DEVICES = (["-1"], ["NoDevFiles"])  # values that mean none, of CUDA and of SLURM in a job without GPUs
_SHOWN = 100  # columns of a device list in a message

_NO_FAILURE = {
    ExitStatus.DONE: "done",
    ExitStatus.STOPPED: "stopped, and saved",
    ExitStatus.INTERRUPTED: "ended at once",
}


@dataclass(frozen=True)
class RunResult:
    """How a run ended; `reason` is empty unless it failed."""

    run: Run
    status: ExitStatus
    seconds: float
    reason: str = ""


@dataclass
class _Child:
    run: Run
    process: subprocess.Popen
    devices: list[str]
    started: float = field(default_factory=time.monotonic)
    forwarded: set[str] = field(default_factory=set)  # requests sent to it


def seed_by_seed(runs: Iterable[Run]) -> list[Run]:
    """All arms with the first seed, then with the second, so that an interrupted study can still compare its arms."""
    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(run)
    return [run for runs in by_seed.values() for run in runs]


def is_finished(run: Run) -> bool:
    """Whether a run has reached its last step.

    A run with a damaged run.json or config.yaml counts as not finished: when it is started again, it sets these files
    aside and resumes from its checkpoints, or reports that it is finished.

    Raises:
        ConfigError: the run was started with settings that differ from the study's; one line that names one of them.
    """
    folder = Path(run.config.output)
    state = status(folder, time.time()).state
    try:
        used = used_settings(run)
    except ConfigError:
        return False
    if state == "no run" or used is None:  # None: it was killed before it wrote its config
        return False
    if changed := difference(used, run.config):
        raise ConfigError(f"{folder} {changed}: give the study another output, or move this folder away")
    return state == "finished"


def has_trunk(run: Run) -> bool:
    """Whether a run can start: it has its own folder, or the checkpoint is there from which it branches off, if any."""
    source = run.config.training.branch_from
    return source is None or Path(source).exists() or (Path(run.config.output) / "checkpoints").exists()


def command(run: Run, config: Path) -> list[str]:
    """The command line that starts a run on this host."""
    ranks = layout(run.config).world_size
    torchrun = ["--standalone", "--nproc-per-node", str(ranks), "-m", "coe_megatron.cli.pretrain", as_argument(config)]
    return [sys.executable, "-m", "coe_megatron.cli.one_host", "--watch-stdin", "--", *torchrun]


class Runner:
    """Starts as many runs as fit at a time, and reports each. A failed run does not stop the others.

    A run waits while another process writes its folder, for example a run of a killed study that is still saving.

    Args:
        devices: names of GPUs as in CUDA_VISIBLE_DEVICES; empty on CPU.
        at_once: maximum number of parallel runs.
        say: called with each line for the user.
        per_device: ranks that share a GPU at a time, each of another run.
    """

    def __init__(self, devices: Sequence[str], at_once: int, say: Callable[[str], None], per_device: int = 1) -> None:
        self._all, self._free = list(devices), Counter(dict.fromkeys(devices, per_device))
        self._at_once, self._say = at_once, say
        self._children: list[_Child] = []
        self._locked: set[str] = set()  # folders that another process has written while their runs waited
        self._preloaded: Preloaded | None = None  # on CPU, created with the first run

    def run(self, runs: Sequence[Run], requests: Requests) -> list[RunResult]:
        """Run all, in order, except that a run that needs more devices than are free lets later runs go first.

        Args:
            requests: `stop` makes running runs save and starts no others; `end` ends them immediately.

        Returns:
            The results of the runs that were started or refused.
        """
        waiting, results = deque(runs), list[RunResult]()
        try:
            while (waiting and not requests.stop.is_set()) or self._children:
                not_started = [] if requests.stop.is_set() else self._start(waiting)
                self._forward(requests)
                for result in (*not_started, *self._collect(waiting)):
                    results.append(result)
                    self._report(results, len(runs))
                time.sleep(_POLL_SECONDS)
        finally:
            for child in self._children:
                _send(child, "end")
            for child in self._children:
                child.process.wait()
            if self._preloaded is not None:
                self._preloaded.close()
                self._preloaded = None
        return results

    def _start(self, waiting: deque[Run]) -> list[RunResult]:
        """Start the runs that fit; returns results of runs that were not started (refused, or finished elsewhere)."""
        results, later = [], []
        while waiting and len(self._children) < self._at_once:
            run = waiting.popleft()
            needed = layout(run.config).world_size if self._all else 0
            if needed > len(self._all):
                reason = f"its {needed} ranks need one device each, but there are only {len(self._all)}"
                results.append(RunResult(run, ExitStatus.MISTAKE, 0.0, reason))
            elif needed > len(free := self._free_devices()) or self._is_locked(run):
                later.append(run)
            elif not has_trunk(run):
                if self._will_run(run.config.training.branch_from, [*waiting, *later]):
                    later.append(run)
                else:
                    reason = f"training.branch_from is {run.config.training.branch_from}: it does not exist"
                    results.append(RunResult(run, ExitStatus.MISTAKE, 0.0, reason))
            elif run.config.output in self._locked and _reached_last_step(run):  # in the other process
                results.append(RunResult(run, ExitStatus.DONE, 0.0))
            else:
                try:
                    self._children.append(self._launch(run, free[:needed]))
                except OSError as error:
                    results.append(RunResult(run, ExitStatus.FAILED, 0.0, f"it cannot be started: {error.strerror}"))
                    continue
                except ConfigError as error:
                    results.append(RunResult(run, ExitStatus.MISTAKE, 0.0, str(error)))
                    continue
                self._free.subtract(free[:needed])
                self._say(f"{run.title}: started, log in {log_of(run)}")
        waiting.extendleft(reversed(later))
        return results

    def _free_devices(self) -> list[str]:
        """GPUs that another rank may use, those with fewest runs first."""
        return sorted((name for name in self._all if self._free[name] > 0), key=lambda name: -self._free[name])

    def _launch(self, run: Run, devices: list[str]) -> _Child:
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", "1")
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        elif self._preloaded is None and without_gpu():
            self._preloaded = Preloaded((*TRAINING, *PICTURES))
        words = command(run, write_config(run))
        with require_writable(log_of(run), "the run's log", "file").open("a") as log:
            print(f"{_ATTEMPT_LINE}{shlex.join(words)}", file=log, flush=True)
            # In its own session, Ctrl-C reaches only this process, which then asks the runs to save.
            process = Popen(
                words,
                self._preloaded,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,
            )
        return _Child(run, process, devices)

    def _is_locked(self, run: Run) -> bool:
        """Whether another process writes the run's folder; reported once."""
        locked = bool(is_held(Path(run.config.output)))
        if locked and run.config.output not in self._locked:
            self._locked.add(run.config.output)
            self._say(f"{run.title}: waits for another process, which writes {run.config.output}")
        return locked

    def _will_run(self, checkpoint: str | None, waiting: Iterable[Run]) -> bool:
        """Whether the run of a checkpoint is running, or waits for its turn."""
        folders = [run.config.output for run in (*waiting, *(child.run for child in self._children))]
        return any(Path(checkpoint or "").is_relative_to(folder) for folder in folders)

    def _forward(self, requests: Requests) -> None:
        """Send new requests to all running runs."""
        for word, requested in (("stop", requests.stop), ("end", requests.end)):
            for child in self._children:
                if requested.is_set() and word not in child.forwarded:
                    child.forwarded.add(word)
                    _send(child, word)

    def _collect(self, waiting: deque[Run]) -> list[RunResult]:
        """Results of the runs that have ended; a run that found its folder locked is put back into the queue."""
        results = []
        for child in [child for child in self._children if child.process.poll() is not None]:
            self._children.remove(child)
            self._free.update(child.devices)
            status = known_status(child.process.returncode)
            if status is ExitStatus.BUSY:
                waiting.append(child.run)
                continue
            no_message = f"no error message; its log is {log_of(child.run)}"
            reason = "" if status in _NO_FAILURE else failure_reason(child.run) or no_message
            results.append(RunResult(child.run, status, time.monotonic() - child.started, reason))
        return results

    def _report(self, results: Sequence[RunResult], runs: int) -> None:
        last = results[-1]
        outcome = _NO_FAILURE.get(last.status) or f"{last.status.name}: {last.reason}"
        durations = [each.seconds for each in results if each.status is ExitStatus.DONE and each.seconds]
        left = runs - len(results)
        rounds = left / max(1, min(self._at_once, left))
        eta = f", about {format_duration(rounds * mean(durations))} left" if durations and left else ""
        self._say(f"{last.run.title}: {outcome}, after {format_duration(last.seconds)} ({len(results)} of {runs}{eta})")


def usable_devices(option: str | None, environment: Mapping[str, str]) -> list[str]:
    """The GPUs to use, named as in CUDA_VISIBLE_DEVICES; empty on a host without GPUs.

    Args:
        option: comma-separated names; None means those of CUDA_VISIBLE_DEVICES, or all GPUs if that is not set.

    Raises:
        ConfigError: a name is repeated in `option`, or is not the name of a device.
    """
    source, given = (
        ("CUDA_VISIBLE_DEVICES", environment.get("CUDA_VISIBLE_DEVICES")) if option is None else ("--devices", option)
    )
    if given is not None:
        names = [name.strip() for name in given.split(",") if name.strip()]
        if names in _NO_DEVICES:
            return []
        if wrong := next((name for name in names if not _DEVICE.fullmatch(name)), None):
            raise ConfigError(
                f"{source} is {shortened(given, _SHOWN)}: {shortened(wrong, _SHOWN)} is not a GPU: use its number in "
                "nvidia-smi, such as 0, or a name that begins with GPU- or MIG-"
            )
        if option is not None and len(set(names)) < len(names):
            raise ConfigError(f"--devices is {option}: name each device once")
        return names
    found = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*"))
    return sorted((number for number in found if number.isdecimal()), key=int)


def failure_reason(run: Run) -> str:
    """Why a run failed, in one line, from the log of its last attempt or its run.json.

    Empty if it is still running, was asked to stop, or was killed.
    """
    with suppress(OSError, ConfigError):
        last_attempt = _tail(require_file(log_of(run), "log")).rpartition(_ATTEMPT_LINE)[2]
        if errors := _ERROR_LINE.findall(last_attempt):
            return one_line(errors[-1])
    return status(Path(run.config.output), time.time()).reason or ""


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL))
        return file.read(_LOG_TAIL).decode(errors="replace")


def run_status(run: Run, now: float) -> Status:
    """The status of a run at `now` seconds since 1970; a run that was refused at its start has only a log."""
    kind_of(Path(run.config.output), "output")  # raises if the folder cannot be accessed: there may be a run in it
    found = status(Path(run.config.output), now)
    if found.state == "no run" and (reason := failure_reason(run)):
        return replace(found, state="failed", reason=reason, log=str(log_of(run)))
    return found


def _send(child: _Child, word: str) -> None:
    assert child.process.stdin is not None
    with suppress(OSError):  # it has just ended
        child.process.stdin.write(f"{word}\n")
        child.process.stdin.flush()


def _reached_last_step(run: Run) -> bool:
    return status(Path(run.config.output), time.time()).state == "finished"
