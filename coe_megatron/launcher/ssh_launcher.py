"""Runs a command on each of several hosts through a remote shell, with their output, requests and exit statuses."""

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
from coe_megatron.run.exit_status import ExitStatus, known_status, root_status

# Environment variables that commands on other hosts inherit, by prefix.
EXPORTED = ("GLOO_", "LD_LIBRARY_PATH", "NCCL_", "OMP_NUM_THREADS", "PYTHONPATH", "UCX_", "WANDB_")
_POLL_SECONDS = 0.2
_PEER_GRACE_SECONDS = 15.0  # for other hosts to end by themselves after one has failed
_END_GRACE_SECONDS = 10.0  # for hosts to end after an `end` request


def exported(environment: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """The environment variables for other hosts: those of `EXPORTED`, and `more` by name.

    Raises:
        ConfigError: one of `more` is not set.
    """
    for name in more:
        if name not in environment:
            raise ConfigError(f"--export is {name}: there is no such variable in the environment")
    return {name: value for name, value in sorted(environment.items()) if name in more or name.startswith(EXPORTED)}


def command_string(command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> str:
    """The command line for a remote shell: the command, in the same folder, with these variables."""
    settings = [f"{name}={value}" for name, value in variables.items()]
    return f"cd {shlex.quote(str(folder))} && exec {shlex.join(['env', *settings, *command])}"


def run_on_host(shell: Sequence[str], host: Host, command: str, seconds: float = 60) -> str:
    """Run a command on a host and return its stdout.

    Raises:
        ConfigError: the host cannot be reached or the command fails; one line that names the host.
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
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(f"host {host.name}: {shell[0]} ended with status {done.returncode}: {one_line(last)}")
    return done.stdout


class RemoteCommands:
    """One running command per host. The commands end on request through stdin, or when their stdin closes."""

    def __init__(self, shell: Sequence[str], commands: Mapping[str, str], needed: int, reporting: bool = False) -> None:
        """Start the commands.

        Args:
            commands: the command string of each host; the first host is always required.
            needed: if fewer hosts than this remain, or the first one fails, all are ended.
            reporting: only the first host counts: when it ends, the others are ended, and `lines` of output are kept.
        """
        self.processes = {name: _start([*shell, name, command]) for name, command in commands.items()}
        self.needed, self.failed, self._sent = needed, dict[str, int](), set[str]()
        self._ended = set[str]()  # hosts that were ended because others had failed; their status does not count
        self.lines: dict[str, list[str]] = {name: [] for name in commands}
        self._print_lock, self.reporting = threading.Lock(), reporting
        self._readers = [threading.Thread(target=self._copy, args=(name,), daemon=True) for name in commands]
        for reader in self._readers:
            reader.start()

    def wait(self, requests: Requests | None = None) -> ExitStatus:
        """Wait until all have ended; once too few hosts remain, end the others within seconds.

        Args:
            requests: are forwarded to all hosts. A signal handler only sets them: it may have interrupted a write to
                the same pipes.
        """
        ending: float | None = None
        while running := self._running():
            self._forward(requests)
            if ending is None and self._too_few():
                ending = time.monotonic() + _PEER_GRACE_SECONDS
            if ending is not None and time.monotonic() > ending:
                self._end(running)
            time.sleep(_POLL_SECONDS)
        for reader in self._readers:
            reader.join(timeout=_END_GRACE_SECONDS)  # a process on the host may hold the other end open
        return self._status()

    def _forward(self, requests: Requests | None) -> None:
        if requests is None:
            return
        for word, request in (("stop", requests.stop), ("end", requests.end)):
            if request.is_set() and word not in self._sent:
                self._send(word)

    def _send(self, word: str) -> None:
        """Send a word to all running commands."""
        self._sent.add(word)
        for process in self.processes.values():
            if process.stdin and process.poll() is None:
                with suppress(OSError):  # the command has just ended
                    process.stdin.write(f"{word}\n")
                    process.stdin.flush()

    def _running(self) -> dict[str, subprocess.Popen]:
        running = {}
        for name, process in self.processes.items():
            if (status := process.poll()) is None:
                running[name] = process
            elif status != 0 and name not in self.failed and name not in self._ended:
                self.failed[name] = status
                _write_line(f"{name}: ended with status {status}\n", self._print_lock)
        return running

    def _too_few(self) -> bool:
        first = next(iter(self.processes))
        if self.reporting:
            return self.processes[first].poll() is not None
        return first in self.failed or len(self.processes) - len(self.failed) < self.needed

    def _end(self, running: Mapping[str, subprocess.Popen]) -> None:
        self._ended |= set(running)
        self._send("end")
        for process in running.values():
            try:
                process.wait(timeout=_END_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()  # its host does not answer; the remote command ends when its stdin closes

    def _copy(self, name: str) -> None:
        source = self.processes[name].stdout
        assert source is not None
        for line in source:
            if self.reporting:
                self.lines[name].append(line)
            _write_line(f"{name}: {line.rstrip()}\n", self._print_lock)

    def _status(self) -> ExitStatus:
        """The status of the first failed host with a status other than FAILED."""
        if not self._too_few():
            return ExitStatus.DONE
        return root_status(known_status(status) for status in self.failed.values())


def _start(command: Sequence[str]) -> subprocess.Popen:
    """Start a command in its own session, so that Ctrl-C does not cut the connection while ranks save."""
    more: dict[str, Any] = {"text": True, "errors": "replace", "bufsize": 1, "start_new_session": True}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)


def _write_line(line: str, lock: threading.Lock) -> None:
    with lock, suppress(BrokenPipeError):
        sys.stdout.write(line)
        sys.stdout.flush()
