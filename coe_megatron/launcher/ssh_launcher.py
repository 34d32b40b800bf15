"""A command on each of several hosts through a remote shell: their output, what they are told, and how they end."""

import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from coe_megatron.errors import ConfigError, one_line
from coe_megatron.launcher.hosts import Host
from coe_megatron.launcher.torchrun_supervisor import Requests
from coe_megatron.run.exit_status import ExitStatus, known_status, verdict

# What a command on another host gets of this one's environment, by the beginning of its name.
EXPORTED = ("GLOO_", "LD_LIBRARY_PATH", "NCCL_", "OMP_NUM_THREADS", "PYTHONPATH", "UCX_", "WANDB_")
_LOOKS_EVERY = 0.2  # seconds
_OTHERS_FOLLOW = 15.0  # seconds that other hosts have to end by themselves when one has failed
_TOLD_TO_END = 10.0  # seconds that they have when they are told to


def exported(environment: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """The part of an environment that goes to other hosts: `EXPORTED`, and more variables by name.

    Raises:
        ConfigError: one of `more` is not set.
    """
    for name in more:
        if name not in environment:
            raise ConfigError(f"--export is {name}: there is no such variable in the environment")
    return {name: value for name, value in sorted(environment.items()) if name in more or name.startswith(EXPORTED)}


def command_string(command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> str:
    """What a remote shell is given: the command, in the same folder, with these variables."""
    settings = [f"{name}={value}" for name, value in variables.items()]
    return f"cd {shlex.quote(str(folder))} && exec {shlex.join(['env', *settings, *command])}"


def ask(shell: Sequence[str], host: Host, command: str, seconds: float = 60) -> str:
    """What a command prints on a host.

    Raises:
        ConfigError: one line that names the host, when it cannot be reached or the command fails.
    """
    try:
        done = subprocess.run(
            [*shell, host.name, command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"host {host.name}: no answer through {shell[0]} in {seconds:.0f} s") from None
    except OSError as error:
        raise ConfigError(f"--remote-shell is {shlex.join(shell)!r}: {error.strerror}") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise ConfigError(f"host {host.name}: {shell[0]} ended with status {done.returncode}: {one_line(last)}")
    return done.stdout


class RemoteCommands:
    """One running command a host. They end when told so on stdin, and by themselves when their stdin does."""

    def __init__(self, shell: Sequence[str], commands: Mapping[str, str], needed: int, reporting: bool = False) -> None:
        """Start them.

        Args:
            commands: the command string of each host; the first host is needed in any case.
            needed: with fewer hosts than this, or without the first, all are ended.
            reporting: the first host reports on all, some of which may fail; its end is the end, and `lines` are kept.
        """
        self.processes = {name: _start([*shell, name, command]) for name, command in commands.items()}
        self.needed, self.failed, self._told = needed, dict[str, int](), set[str]()
        self._ended = set[str]()  # by this, as others had failed: their own status tells nothing
        self.lines: dict[str, list[str]] = {name: [] for name in commands}
        self._speaking, self.reporting = threading.Lock(), reporting
        self._readers = [threading.Thread(target=self._copy, args=(name,), daemon=True) for name in commands]
        for reader in self._readers:
            reader.start()

    def wait(self, requests: Requests | None = None) -> ExitStatus:
        """Until all have ended; the first failure that too few hosts are left after ends the others, in seconds.

        Args:
            requests: are passed on to all hosts. A signal handler sets them and does no more: it may have interrupted a
                write to the very pipes that it would write to.
        """
        ending: float | None = None
        while running := self._running():
            self._pass_on(requests)
            if ending is None and self._too_few():
                ending = time.monotonic() + _OTHERS_FOLLOW
            if ending is not None and time.monotonic() > ending:
                self._end(running)
            time.sleep(_LOOKS_EVERY)
        for reader in self._readers:
            reader.join(timeout=_TOLD_TO_END)  # a process elsewhere may hold the other end open
        return self._status()

    def _pass_on(self, requests: Requests | None) -> None:
        if requests is None:
            return
        for word, request in (("stop", requests.stop), ("end", requests.end)):
            if request.is_set() and word not in self._told:
                self._tell(word)

    def _tell(self, word: str) -> None:
        """Say a word to all that still run."""
        self._told.add(word)
        for process in self.processes.values():
            if process.stdin and process.poll() is None:
                with suppress(OSError):  # it has just ended
                    process.stdin.write(f"{word}\n")
                    process.stdin.flush()

    def _running(self) -> dict[str, subprocess.Popen]:
        running = {}
        for name, process in self.processes.items():
            if (status := process.poll()) is None:
                running[name] = process
            elif status != 0 and name not in self.failed and name not in self._ended:
                self.failed[name] = status
                _say(f"{name}: ended with status {status}\n", self._speaking)
        return running

    def _too_few(self) -> bool:
        first = next(iter(self.processes))
        if self.reporting:
            return self.processes[first].poll() is not None
        return first in self.failed or len(self.processes) - len(self.failed) < self.needed

    def _end(self, running: Mapping[str, subprocess.Popen]) -> None:
        self._ended |= set(running)
        self._tell("end")
        for process in running.values():
            try:
                process.wait(timeout=_TOLD_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()  # its host does not answer; what runs there ends with its stdin

    def _copy(self, name: str) -> None:
        source = self.processes[name].stdout
        assert source is not None
        for line in source:
            if self.reporting:
                self.lines[name].append(line)
            _say(f"{name}: {line.rstrip()}\n", self._speaking)

    def _status(self) -> ExitStatus:
        """By the first host to fail that says more than "failed"."""
        if not self._too_few():
            return ExitStatus.DONE
        return verdict(known_status(status) for status in self.failed.values())


def _start(command: Sequence[str]) -> subprocess.Popen:
    """In a session of its own, so that Ctrl-C does not break the connection while ranks are saving."""
    more: dict[str, Any] = {"text": True, "errors": "replace", "bufsize": 1, "start_new_session": True}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)


def _say(line: str, lock: threading.Lock) -> None:
    with lock, suppress(BrokenPipeError):
        sys.stdout.write(line)
        sys.stdout.flush()
