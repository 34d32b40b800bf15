"""The runs of a study on this machine, one after another or packed on its devices; what is done is not done again."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from coe_megatron.config import RunConfig, flat, load
from coe_megatron.config.layout import layout
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import as_argument, kind_of, require_file, require_writable
from coe_megatron.launcher.preloaded import PICTURES, TRAINING, Popen, Preloaded, without_gpu
from coe_megatron.launcher.torchrun_supervisor import Requests
from coe_megatron.run.exit_status import ExitStatus, known_status
from coe_megatron.run.lock import is_held
from coe_megatron.run.status import Status, status
from coe_megatron.study.plan.arms import Run
from coe_megatron.study.plan.cost_table import format_duration
from coe_megatron.study.run.paths import log_of, write_config
from coe_megatron.text import shortened

_POLL_SECONDS = 0.2  # seconds
_BEGINS = "study.py begins: "  # the first line of every attempt in a run's log
_LAST_WORDS = re.compile(r"coe-[\w-]+: (?:error|ended with status \d+ \((?!STOPPED)\w+\), rank \d+): (.*)")
_LOG_END = 1 << 20  # bytes of a log in which an error is looked for
_DEVICE = re.compile(r"0|[1-9][0-9]{0,3}|(GPU|MIG)-[0-9A-Za-z/-]+", re.ASCII)  # as CUDA_VISIBLE_DEVICES has them
_NO_DEVICES = (["-1"], ["NoDevFiles"])  # as CUDA, and SLURM for a job without GPUs, have it
_SHOWN = 100  # characters of such a text in a message


_NO_FAILURE = {
    ExitStatus.DONE: "done",
    ExitStatus.STOPPED: "stopped, and saved",
    ExitStatus.INTERRUPTED: "ended at once",
}


@dataclass(frozen=True)
class Ended:
    """How a run ended here; `reason` is empty of one that did not fail."""

    run: Run
    status: ExitStatus
    seconds: float
    reason: str = ""


@dataclass
class _Child:
    run: Run
    process: subprocess.Popen
    devices: list[str]
    began: float = field(default_factory=time.monotonic)
    told: set[str] = field(default_factory=set)


def seed_by_seed(runs: Iterable[Run]) -> list[Run]:
    """All arms with the first seed, then with the second: a study that is broken off still compares its arms."""
    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(run)
    return [run for runs in by_seed.values() for run in runs]


def is_finished(run: Run) -> bool:
    """Whether it came to its last step.

    One whose run.json or config.yaml is damaged is not counted: started again it sets them aside, and goes on from its
    checkpoints, or says that it is finished.

    Raises:
        ConfigError: it did so, or began, with other settings than the study has now; one line that names one of them.
    """
    folder = Path(run.config.output)
    state = status(folder, time.time()).state
    try:
        then = _settings(run)
    except ConfigError:
        return False
    if state == "no run" or then is None:  # None of one that was killed as it began
        return False
    if said := _difference(then, run.config):
        raise ConfigError(f"{folder} {said}: give the study another output, or move this folder away")
    return state == "finished"


def changed(run: Run) -> str:
    """What the settings of a run that has begun have against those that the study has now; empty if they are equal."""
    try:
        then = _settings(run)
    except ConfigError as error:
        return f"has settings that cannot be read ({error})"
    return "has no config.yaml" if then is None else _difference(then, run.config)


def _settings(run: Run) -> RunConfig | None:
    """Of a run that has begun; None if it has no config.yaml. ConfigError if that is damaged."""
    path = Path(run.config.output) / "config.yaml"
    return None if kind_of(path, "config.yaml") is None else load(path)


def command(run: Run, config: Path) -> list[str]:
    """What starts a run on this host."""
    ranks = layout(run.config).world_size
    torchrun = ["--standalone", "--nproc-per-node", str(ranks), "-m", "coe_megatron.cli.pretrain", as_argument(config)]
    return [sys.executable, "-m", "coe_megatron.cli.one_host", "--watch-stdin", "--", *torchrun]


class Runner:
    """Starts runs, as many as fit, and tells of each. One that fails stops no other.

    A run whose folder another process writes, such as one that a killed study has left behind and that is still saving,
    waits for that.

    Args:
        devices: GPUs, as CUDA_VISIBLE_DEVICES names them, each for one run at a time; empty on CPU.
        at_once: how many runs at a time.
        say: takes each line for the user.
    """

    def __init__(self, devices: Sequence[str], at_once: int, say: Callable[[str], None]) -> None:
        self._all, self._free = list(devices), list(devices)
        self._at_once, self._say = at_once, say
        self._children: list[_Child] = []
        self._held: set[str] = set()
        self._preloaded: Preloaded | None = None  # on CPU, from the first run on

    def run(self, runs: Sequence[Run], requests: Requests) -> list[Ended]:
        """All of them in their order, but for those that must wait for more devices than are free.

        Args:
            requests: to stop: runs save, and none is started any more; to end: at once.

        Returns:
            How those ended that were started.
        """
        waiting, ended = deque(runs), list[Ended]()
        try:
            while (waiting and not requests.stop.is_set()) or self._children:
                over = [] if requests.stop.is_set() else self._start(waiting)
                self._tell(requests)
                for one in (*over, *self._bury_all(waiting)):
                    ended.append(one)
                    self._report(ended, len(runs))
                time.sleep(_POLL_SECONDS)
        finally:
            for child in self._children:
                _say_to(child, "end")
            for child in self._children:
                child.process.wait()
            if self._preloaded is not None:
                self._preloaded.close()
                self._preloaded = None
        return ended

    def _start(self, waiting: deque[Run]) -> list[Ended]:
        """Start what can be; returns what is over without that."""
        over, later = [], []
        while waiting and len(self._children) < self._at_once:
            run = waiting.popleft()
            needed = layout(run.config).world_size if self._all else 0
            if needed > len(self._all):
                reason = f"its {needed} ranks need a device each, and there are {len(self._all)}"
                over.append(Ended(run, ExitStatus.MISTAKE, 0.0, reason))
            elif needed > len(self._free) or self._is_held(run):
                later.append(run)
            elif run.config.output in self._held and _came_to_its_end(run):  # by whoever held it
                over.append(Ended(run, ExitStatus.DONE, 0.0))
            else:
                try:
                    self._children.append(self._launch(run, self._free[:needed]))
                except OSError as error:
                    over.append(Ended(run, ExitStatus.FAILED, 0.0, f"it cannot be started: {error.strerror}"))
                    continue
                except ConfigError as error:
                    over.append(Ended(run, ExitStatus.MISTAKE, 0.0, str(error)))
                    continue
                self._free = self._free[needed:]
                self._say(f"{_name(run)}: begins, log in {log_of(run)}")
        waiting.extendleft(reversed(later))
        return over

    def _launch(self, run: Run, devices: list[str]) -> _Child:
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", "1")
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        elif self._preloaded is None and without_gpu():
            self._preloaded = Preloaded((*TRAINING, *PICTURES))
        words = command(run, write_config(run))
        with require_writable(log_of(run), "the run's log", "file").open("a") as log:
            print(f"{_BEGINS}{shlex.join(words)}", file=log, flush=True)
            # A session of its own: Ctrl-C is for the study, which asks its runs to save.
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

    def _is_held(self, run: Run) -> bool:
        """Whether another process writes the run's folder; said once."""
        held = bool(is_held(Path(run.config.output)))
        if held and run.config.output not in self._held:
            self._held.add(run.config.output)
            self._say(f"{_name(run)}: waits for another process, which writes {run.config.output}")
        return held

    def _tell(self, requests: Requests) -> None:
        for word, asked in (("stop", requests.stop), ("end", requests.end)):
            for child in self._children:
                if asked.is_set() and word not in child.told:
                    child.told.add(word)
                    _say_to(child, word)

    def _bury_all(self, waiting: deque[Run]) -> list[Ended]:
        """How those ended that have; one whose folder another process took first waits again."""
        ended = []
        for child in [child for child in self._children if child.process.poll() is not None]:
            self._children.remove(child)
            self._free = sorted(self._free + child.devices, key=self._all.index)
            how = known_status(child.process.returncode)
            if how is ExitStatus.BUSY:
                waiting.append(child.run)
                continue
            reason = "" if how in _NO_FAILURE else why(child.run) or f"without a word; its log is {log_of(child.run)}"
            ended.append(Ended(child.run, how, time.monotonic() - child.began, reason))
        return ended

    def _report(self, ended: Sequence[Ended], runs: int) -> None:
        last = ended[-1]
        how = _NO_FAILURE.get(last.status) or f"{last.status.name}: {last.reason}"
        took = [each.seconds for each in ended if each.status is ExitStatus.DONE and each.seconds]
        left = runs - len(ended)
        rounds = left / max(1, min(self._at_once, left))
        soon = f", some {format_duration(rounds * sum(took) / len(took))} left" if took and left else ""
        self._say(f"{_name(last.run)}: {how}, after {format_duration(last.seconds)} ({len(ended)} of {runs}{soon})")


def devices_here(asked: str | None, environment: Mapping[str, str]) -> list[str]:
    """The GPUs a program of ours may use, as CUDA_VISIBLE_DEVICES names them; none on a machine without.

    Args:
        asked: names with commas between; when None those of CUDA_VISIBLE_DEVICES, and without that all.

    Raises:
        ConfigError: one of those that were asked for is there twice, or one is no name of a device.
    """
    whose, given = (
        ("CUDA_VISIBLE_DEVICES", environment.get("CUDA_VISIBLE_DEVICES")) if asked is None else ("--devices", asked)
    )
    if given is not None:
        names = [name.strip() for name in given.split(",") if name.strip()]
        if names in _NO_DEVICES:
            return []
        if wrong := next((name for name in names if not _DEVICE.fullmatch(name)), None):
            raise ConfigError(
                f"{whose} is {shortened(given, _SHOWN)}: {shortened(wrong, _SHOWN)} is no GPU, which is a number as of "
                "nvidia-smi, such as 0, or a name that begins with GPU- or MIG-"
            )
        if asked is not None and len(set(names)) < len(names):
            raise ConfigError(f"--devices is {asked}: each must be another")
        return names
    found = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*"))
    return sorted((number for number in found if number.isdecimal()), key=int)


def why(run: Run) -> str:
    """Why a run did not come to its end, in one line, as the log of its last attempt or its run.json tells.

    Empty where there is nothing to tell: it goes on, was asked to stop, or was killed.
    """
    with suppress(OSError, ConfigError):
        if said := _LAST_WORDS.findall(_end_of(require_file(log_of(run), "log")).rpartition(_BEGINS)[2]):
            return one_line(said[-1])
    return status(Path(run.config.output), time.time()).reason or ""


def _end_of(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_END))
        return file.read(_LOG_END).decode(errors="replace")


def stands(run: Run, now: float) -> Status:
    """How a run stands, at `now` seconds since 1970; one that was refused before it began has left but a log."""
    kind_of(Path(run.config.output), "output")  # a name that is too long, no rights: said, for there may be a run
    found = status(Path(run.config.output), now)
    if found.state == "no run" and (reason := why(run)):
        return replace(found, state="failed", reason=reason, log=str(log_of(run)))
    return found


def _say_to(child: _Child, word: str) -> None:
    assert child.process.stdin is not None
    with suppress(OSError):  # it has just ended
        child.process.stdin.write(f"{word}\n")
        child.process.stdin.flush()


def _came_to_its_end(run: Run) -> bool:
    return status(Path(run.config.output), time.time()).state == "finished"


def _name(run: Run) -> str:
    return f"{run.arm}, seed {run.seed}"


def _difference(then: RunConfig, now: RunConfig) -> str:
    """The first setting that differs, with its value then and now; empty if none does."""
    was, values = flat(then), flat(now)
    for key, value in values.items():
        if key != "output" and was.get(key) != value:
            return f"was run with {key} {was.get(key)}, and the study has {value} now"
    return ""
