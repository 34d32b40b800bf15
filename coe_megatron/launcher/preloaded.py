"""Starts Python programs from a process that has imported what they need: a start takes milliseconds, not seconds.

`Preloaded` is that process: single-threaded, without CUDA and process groups. It forks each program, which then looks
as if it had been started afresh: its own arguments, folder, environment, streams, session, signals, `sys.path`, and the
starter as its parent. What it cannot imitate is read at imports: environment variables of libraries, and modules that
another PYTHONPATH would shadow. On GPUs a plain start is right, since a library may use CUDA as it is imported.

To be the parent of what a child forks, the starter is for a moment a subreaper: the process in between ends at once,
and the kernel gives its child to the starter. Programs of a starter that is killed see that as they do otherwise.
"""

import atexit
import ctypes
import gc
import importlib
import multiprocessing
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, Never

from coe_megatron.lean_imports import without_collection

# What a training run imports, and the launcher that starts its ranks: modules, and functions to call (after a colon).
TRAINING = (
    "coe_megatron.training.console:quiet_libraries",
    "coe_megatron.lean_imports:import_megatron",
    "coe_megatron.lean_imports:import_deepspeed_muon",
    "coe_megatron.training.loop",
    "coe_megatron.cli.pretraining",
    "torch._dynamo",  # which torch's optimizers import when they are made
    "coe_megatron.distributed.rendezvous",
    "torch.distributed.run",
    "torch.distributed.launcher.api",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "torch.distributed.elastic.rendezvous.registry",
)
PICTURES = ("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg")
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_SET_BY_PYTHON = {signal.SIGPIPE, signal.SIGXFSZ}  # ignored in each Python, and given back as it starts programs
_ENTRY = f"from {__name__} import _main; _main()"

_installed: list[str] = []  # sys.path without a program's own folder and PYTHONPATH
_loaded = False  # whether this process, or the one that it was forked from, has the imports


@dataclass(frozen=True)
class _Start:
    """What a program is to look like; `source` is ("-m", MODULE) or ("", SCRIPT)."""

    source: tuple[str, str]
    arguments: list[str]
    unbuffered: bool
    folder: str
    environment: dict[str, str]
    umask: int
    group: int | None  # None: a session of its own
    ignored: list[signal.Signals]


class Preloaded:
    """A process that has imported modules, for `Popen`; it ends with this one, and with the `with` block.

    In a program that was itself started by `Popen`, or has called `load`, it is forked from that, without imports. Then
    it has to be made before any thread is begun.

    Args:
        modules: their names; `module:function` is called without arguments.
    """

    def __init__(self, modules: Sequence[str] = TRAINING) -> None:
        self._lock, self._end = threading.Lock(), None
        here, there = multiprocessing.Pipe()
        if is_loaded() and threading.active_count() == 1:
            if (pid := os.fork()) == 0:
                here.close()
                _detach()
                _serve(there)
            self._wait: Any = lambda: os.waitpid(pid, 0)
        else:
            command = [sys.executable, "-c", _ENTRY, str(there.fileno()), *modules]
            quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "process_group": 0}
            self._wait = subprocess.Popen(command, pass_fds=[there.fileno()], **quiet).wait
        there.close()
        self._connection = here

    def __enter__(self) -> "Preloaded":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; programs that it has forked go on."""
        if not self._connection.closed:
            self._connection.close()
            self._wait()

    def _fork(self, start: _Start, streams: Sequence[int]) -> int | None:
        """The process id of a new child of this process; None if the preloaded one is no more."""
        with self._lock, _adopting():
            try:
                self._connection.send(start)
                for stream in streams:
                    send_handle(self._connection, stream, None)
                return self._connection.recv() or None
            except (EOFError, OSError):
                return None


class Popen(subprocess.Popen):
    """`subprocess.Popen` that has a preloaded process fork `python SCRIPT ...` and `python -m MODULE ...`.

    Anything else (other programs, other options of Python or of Popen), and all when `preloaded` is None or has ended,
    is started afresh.
    """

    def __init__(self, args: Sequence[str], preloaded: Preloaded | None = None, **more: Any) -> None:
        self._preloaded, self._own_session = preloaded, more.get("start_new_session", False)
        super().__init__(args, **more)

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: bool, *more: Any) -> None:  # fmt: skip
        """Subprocess's own hook; `more` begins with both ends of the pipes for the three streams."""
        program = None if executable or preexec_fn or pass_fds or shell else _program(args, cwd)
        if self._preloaded is not None and program is not None:
            reads, _, _, writes, _, complains = pipes = more[:6]
            streams = [own if given == -1 else given for own, given in enumerate((reads, writes, complains))]
            start = self._start(*program, cwd, env)
            if (pid := self._preloaded._fork(start, streams)) is not None:
                self.pid, self._child_created = pid, True
                self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
                return
        super()._execute_child(  # type: ignore[misc]
            args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *more
        )

    def _start(self, unbuffered: bool, source: tuple[str, str], arguments: list[str], cwd: Any, env: Any) -> _Start:
        os.umask(mask := os.umask(0o77))
        ignored = [each for each in signal.valid_signals() if signal.getsignal(each) is signal.SIG_IGN]
        return _Start(
            source,
            arguments,
            unbuffered,
            os.path.abspath(cwd or "."),
            dict(os.environ if env is None else env),
            mask,
            None if self._own_session else os.getpgrp(),
            [signal.Signals(each) for each in ignored if each not in _SET_BY_PYTHON],
        )


def is_loaded() -> bool:
    """Whether this program was forked from a preloaded process, or has called `load`: `Preloaded` costs it nothing."""
    return _loaded


def without_gpu() -> bool:
    """Whether this machine shows no GPU, so that no import can use CUDA. Looks into /dev alone."""
    return not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists()


def _program(args: Any, cwd: Any) -> tuple[bool, tuple[str, str], list[str]] | None:
    """Whether unbuffered, the program, and its arguments; None of what is no plain start of this Python."""
    words = [os.fspath(word) for word in args] if isinstance(args, (list, tuple)) else []
    if words[:1] != [sys.executable]:
        return None
    del words[0]
    if unbuffered := words[:1] == ["-u"]:
        del words[0]
    match words:
        case ["-m", module, *rest]:
            return unbuffered, ("-m", module), rest
        case [script, *rest] if not script.startswith("-") and os.path.isfile(os.path.join(cwd or ".", script)):
            return unbuffered, ("", script), rest
    return None


@contextmanager
def _adopting() -> Iterator[None]:
    """This process as the next parent of orphans below it, and after that as it was."""
    prctl, before = ctypes.CDLL(None).prctl, ctypes.c_int()
    prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def load(modules: Sequence[str] = TRAINING) -> None:
    """Import in this very process, from which `Preloaded` then forks; to be called before any thread is begun.

    Args:
        modules: as `Preloaded` has them.
    """
    global _loaded
    _installed[:] = [entry for entry in sys.path[1:] if entry not in _python_path(os.environ)]
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # or libraries begin threads as they are imported
    with without_collection():
        for name in modules:
            if ":" in name:
                pkgutil.resolve_name(name)()
            else:
                importlib.import_module(name)
    del os.environ["OMP_NUM_THREADS"]
    if before is not None:
        os.environ["OMP_NUM_THREADS"] = before
    gc.collect()
    gc.freeze()  # what has been imported stays in memory that all programs share
    _loaded = True


def _main() -> Never:
    """The preloaded process: imports what its command line names, and serves its parent."""
    connection = Connection(int(sys.argv[1]))
    load(sys.argv[2:])
    _serve(connection)


def _detach() -> None:
    """A preloaded process that was forked has neither its maker's streams nor the terminal's signals."""
    os.setpgid(0, 0)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)


def _serve(connection: Connection) -> Never:
    while True:
        try:
            start = connection.recv()
            streams = [recv_handle(connection) for _ in range(3)]
        except (EOFError, OSError):  # the starter is no more
            os._exit(0)
        reading, writing = os.pipe()
        if (between := os.fork()) == 0:
            between = os.getpid()
            if os.fork():
                os._exit(0)
            _become(start, streams, writing, between)
        os.waitpid(between, 0)
        for descriptor in (writing, *streams):
            os.close(descriptor)
        with suppress(OSError), os.fdopen(reading, "rb") as pipe:
            connection.send(int(pipe.read() or 0))


def _become(start: _Start, streams: Sequence[int], writing: int, between: int) -> Never:
    """Turn this fork into the program, run it, and end."""
    try:
        if start.group is None:
            os.setsid()
        else:
            os.setpgid(0, start.group)
        for own, given in enumerate(streams):
            os.dup2(given, own)
        os.write(writing, str(os.getpid()).encode())
        while os.getppid() == between:
            time.sleep(0.0005)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2:
                with suppress(OSError):  # the listing's own
                    os.close(int(name))
        _dress(start)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    _end(_run(start))


def _dress(start: _Start) -> None:
    """Everything of a process that a program may see, but for its imports."""
    os.umask(start.umask)
    os.chdir(start.folder)
    os.environ.clear()
    os.environ.update(start.environment)
    for number in signal.valid_signals() - _SET_BY_PYTHON - {signal.SIGKILL, signal.SIGSTOP}:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        with suppress(OSError):  # one that the C library keeps
            signal.signal(number, signal.SIG_IGN if number in start.ignored else usual)
    tempfile.tempdir = None
    option, name = start.source
    sys.argv = [name, *start.arguments]
    first = start.folder if option else os.path.dirname(os.path.realpath(name))
    sys.path[:] = [first, *_python_path(start.environment), *_installed]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    unbuffered = start.unbuffered or bool(start.environment.get("PYTHONUNBUFFERED"))
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.reconfigure(line_buffering=descriptor == 2 or unbuffered or os.isatty(descriptor))  # type: ignore[union-attr]
    _set_threads(start.environment)


def _python_path(environment: Mapping[str, str]) -> list[str]:
    return [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _set_threads(environment: Mapping[str, str]) -> None:
    """As many as torch would have taken when it was imported."""
    if torch := sys.modules.get("torch"):
        asked = environment.get("OMP_NUM_THREADS", "")
        count = int(asked) if asked.isdecimal() and int(asked) else len(os.sched_getaffinity(0))
        if count != torch.get_num_threads():
            torch.set_num_threads(count)


def _run(start: _Start) -> int | None:
    """Run the program; returns its exit status, None of one that Ctrl-C has ended."""
    option, name = start.source
    try:
        if option:
            sys.modules.pop(name, None)  # as long as it is not run, a program is not imported
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        return None
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _end(status: int | None) -> Never:
    """As an interpreter ends, but for unwinding what this process was before it was forked."""
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if status is None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status or 0)
