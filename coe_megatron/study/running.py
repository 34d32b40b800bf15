"""The runs of a study on this machine, one after another or packed on its devices; what is done is not done again."""

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coe_megatron.cluster.one_host import Requests
from coe_megatron.config import ConfigError, RunConfig, dump, load
from coe_megatron.config.layout import layout
from coe_megatron.exit_status import ExitStatus, known_status
from coe_megatron.study.arms import Run

_LOOKS_EVERY = 0.2  # seconds
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a run ended here; `reason` is empty of one that is done."""

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

    Raises:
        ConfigError: it did so, or began, with other settings than the study has now; one line that names one of them.
    """
    folder = Path(run.config.output)
    if not (folder / "run.json").exists():
        return False
    if difference := _difference(load(folder / "config.yaml"), run.config):
        raise ConfigError(
            f"{folder} was run with {difference}: give the study another output, or move this folder away"
        )
    attempts = json.loads((folder / "run.json").read_text())["attempts"]
    return bool(attempts) and attempts[-1]["outcome"] == "finished"


def config_of(run: Run) -> Path:
    """The file that `write_config` writes."""
    return Path(f"{run.config.output}.yaml")


def write_config(run: Run) -> Path:
    """The run's whole config as a file beside its folder, which repeats it: `pretrain_coe.py FILE`."""
    path = config_of(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(dump(run.config))
    os.replace(temporary, path)
    return path


def command(run: Run, config: Path) -> list[str]:
    """What starts a run on this host."""
    ranks = layout(run.config).ranks
    torchrun = ["--standalone", "--nproc-per-node", str(ranks), str(_ROOT / "launch/pretrain_coe.py"), str(config)]
    return [sys.executable, str(_ROOT / "launch/one_host.py"), "--watch-stdin", "--", *torchrun]


class Runner:
    """Starts runs, as many as fit, and tells of each. One that fails stops no other.

    Args:
        devices: GPUs, as CUDA_VISIBLE_DEVICES names them, each for one run at a time; empty on CPU.
        at_once: how many runs at a time.
        say: takes each line for the user.
    """

    def __init__(self, devices: Sequence[str], at_once: int, say: Callable[[str], None]) -> None:
        self._all, self._free = list(devices), list(devices)
        self._at_once, self._say = at_once, say
        self._children: list[_Child] = []

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
                if not requests.stop.is_set():
                    ended += self._start(waiting)
                self._tell(requests)
                for child in [child for child in self._children if child.process.poll() is not None]:
                    ended.append(self._bury(child))
                    self._report(ended, len(runs))
                time.sleep(_LOOKS_EVERY)
        finally:
            for child in self._children:
                _say_to(child, "end")
        return ended

    def _start(self, waiting: deque[Run]) -> list[Ended]:
        refused, later = [], []
        while waiting and len(self._children) < self._at_once:
            run = waiting.popleft()
            needed = layout(run.config).ranks if self._all else 0
            if needed > len(self._all):
                reason = f"it has {needed} ranks, and here are {len(self._all)} devices"
                refused.append(Ended(run, ExitStatus.MISTAKE, 0.0, reason))
                self._say(f"{_name(run)}: {reason}")
            elif needed > len(self._free):
                later.append(run)
            else:
                devices, self._free = self._free[:needed], self._free[needed:]
                self._children.append(_launch(run, devices))
                self._say(f"{_name(run)}: begins, log in {log_of(run)}")
        waiting.extendleft(reversed(later))
        return refused

    def _tell(self, requests: Requests) -> None:
        for word, asked in (("stop", requests.stop), ("end", requests.end)):
            for child in self._children:
                if asked.is_set() and word not in child.told:
                    child.told.add(word)
                    _say_to(child, word)

    def _bury(self, child: _Child) -> Ended:
        self._children.remove(child)
        self._free = sorted(self._free + child.devices, key=self._all.index)
        status = known_status(child.process.returncode)
        reason = "" if status is ExitStatus.DONE else why(child.run)
        return Ended(child.run, status, time.monotonic() - child.began, reason)

    def _report(self, ended: Sequence[Ended], runs: int) -> None:
        last = ended[-1]
        how = {ExitStatus.DONE: "done", ExitStatus.STOPPED: "stopped, and saved"}.get(last.status)
        how = how or f"{last.status.name}: {last.reason}"
        took = [each.seconds for each in ended if each.status is ExitStatus.DONE]
        left = runs - len(ended)
        soon = f", some {minutes(left * sum(took) / len(took) / self._at_once)} left" if took and left else ""
        self._say(f"{_name(last.run)}: {how}, after {minutes(last.seconds)} ({len(ended)} of {runs}{soon})")


def devices_here(environment: Mapping[str, str]) -> list[str]:
    """The GPUs a program of ours may use: those of CUDA_VISIBLE_DEVICES, else all; none on a machine without."""
    if (given := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name]
    found = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*"))
    return sorted((number for number in found if number.isdecimal()), key=int)


def log_of(run: Run) -> Path:
    """What a run has said, in all its attempts."""
    return Path(f"{run.config.output}.log")


def why(run: Run) -> str:
    """Why a run did not come to its end, in one line, as its own files tell; empty where there are none."""
    with suppress(OSError, ValueError, KeyError, IndexError):
        outcome = json.loads((Path(run.config.output) / "run.json").read_text())["attempts"][-1]["outcome"]
        if outcome.startswith("failed: "):
            return str(outcome.removeprefix("failed: "))
    with suppress(OSError):
        lines = log_of(run).read_text(errors="replace").splitlines()
        said = [line for line in lines if "error: " in line]
        return said[-1].partition("error: ")[2] if said else f"without a word; its log is {log_of(run)}"
    return ""


def minutes(seconds: float) -> str:
    """A span of time for a person."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _launch(run: Run, devices: list[str]) -> _Child:
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", "1")
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    config = write_config(run)
    with log_of(run).open("a") as log:
        # A session of its own: Ctrl-C is for the study, which asks its runs to save.
        process = subprocess.Popen(
            command(run, config),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            text=True,
            start_new_session=True,
        )
    return _Child(run, process, devices)


def _say_to(child: _Child, word: str) -> None:
    assert child.process.stdin is not None
    with suppress(OSError):  # it has just ended
        child.process.stdin.write(f"{word}\n")
        child.process.stdin.flush()


def _name(run: Run) -> str:
    return f"{run.arm}, seed {run.seed}"


def _difference(then: RunConfig, now: RunConfig) -> str:
    """The first setting that differs, with its value then and now; empty if none does."""
    was, values = dict(_flat(asdict(then))), dict(_flat(asdict(now)))
    for key, value in values.items():
        if key != "output" and was.get(key) != value:
            return f"{key} {was.get(key)}, and the study has {value} now"
    return ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
