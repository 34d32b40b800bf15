"""Starts Python programs by forking a process that has already imported their modules: in milliseconds, not seconds.

`Preloaded` is that process: single-threaded, without CUDA and process groups. Each program is a fork of it, with its
own arguments, working folder, environment, streams, session, signals and `sys.path`, and with the caller as its parent.
Two things differ from a new interpreter, since they take effect during imports: environment variables that libraries
read, and modules that another PYTHONPATH would shadow. With GPUs, start a new interpreter: libraries may use CUDA when
they are imported.

The caller becomes the parent as a temporary subreaper: the intermediate process exits at once, and the kernel reparents
its child to the caller. If the caller is killed, the programs notice this as usual.
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

# The imports of a training run and of the launcher of its ranks: modules, and functions to call (after a colon).
TRAINING = (
    "coe_megatron.training.console:quiet_libraries",
    "coe_megatron.lean_imports:import_megatron",
    "coe_megatron.lean_imports:import_deepspeed_muon",
    "coe_megatron.training.loop",
    "coe_megatron.cli.pretraining",
    "torch._dynamo",  # torch's optimizers import it when they are created
    "coe_megatron.distributed.rendezvous",
    "torch.distributed.run",
    "torch.distributed.launcher.api",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "torch.distributed.elastic.rendezvous.registry",
)
PICTURES = ("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg")
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_SET_BY_PYTHON = {signal.SIGPIPE, signal.SIGXFSZ}  # Python ignores them, and restores them for programs it starts
_ENTRY = f"from {__name__} import _main; _main()"

_installed: list[str] = []  # sys.path without the program's folder and PYTHONPATH
_loaded = False  # whether this process, or the one it was forked from, has the imports


@dataclass(frozen=True)
class _Start:
    """The program to start and the attributes of its process; `source` is ("-m", MODULE) or ("", SCRIPT)."""

    source: tuple[str, str]
    arguments: list[str]
    unbuffered: bool
    folder: str
    environment: dict[str, str]
    umask: int
    group: int | None  # process group; None for a new session
    ignored: list[signal.Signals]


class Preloaded:
    """A process that has imported modules, for `Popen`; it ends with the `with` block, or with this process.

    In a program that was itself started by `Popen`, or that has called `load`, it is a fork of the program and imports
    nothing. In that case create it before any thread starts.

    Args:
        modules: names of modules to import; `module:function` is called without arguments.
    """

    def __init__(self, modules: Sequence[str] = TRAINING) -> None:
        self._lock = threading.Lock()
        own_end, other_end = multiprocessing.Pipe()
        if is_loaded() and threading.active_count() == 1:
            if (pid := os.fork()) == 0:
                own_end.close()
                _detach()
                _serve(other_end)
            self._wait: Any = lambda: os.waitpid(pid, 0)
        else:
            command = [sys.executable, "-c", _ENTRY, str(other_end.fileno()), *modules]
            quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "process_group": 0}
            self._wait = subprocess.Popen(command, pass_fds=[other_end.fileno()], **quiet).wait
        other_end.close()
        self._connection = own_end

    def __enter__(self) -> "Preloaded":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; the programs that it forked keep running."""
        if not self._connection.closed:
            self._connection.close()
            self._wait()

    def _fork(self, start: _Start, streams: Sequence[int]) -> int | None:
        """Start a program as a child of this process; returns its id, None if the preloaded process has ended."""
        with self._lock, _adopting():
            try:
                self._connection.send(start)
                for stream in streams:
                    send_handle(self._connection, stream, None)
                return self._connection.recv() or None
            except (EOFError, OSError):
                return None


class Popen(subprocess.Popen):
    """`subprocess.Popen` that forks a preloaded process for `python SCRIPT ...` and `python -m MODULE ...`.

    It starts a new interpreter or program as usual if the command is another one, if it has other options of Python or
    Popen, or if `preloaded` is None or has ended.
    """

    def __init__(self, args: Sequence[str], preloaded: Preloaded | None = None, **more: Any) -> None:
        self._preloaded, self._own_session = preloaded, more.get("start_new_session", False)
        super().__init__(args, **more)

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: bool, *more: Any) -> None:  # fmt: skip
        """Hook of subprocess; `more` begins with both ends of the pipes for stdin, stdout and stderr."""
        program = None if executable or preexec_fn or pass_fds or shell else _program(args, cwd)
        if self._preloaded is not None and program is not None:
            stdin, _, _, stdout, _, stderr = pipes = more[:6]
            streams = [inherited if given == -1 else given for inherited, given in enumerate((stdin, stdout, stderr))]
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
    """Whether this program was forked from a preloaded process or has called `load`; `Preloaded` then only forks."""
    return _loaded


def without_gpu() -> bool:
    """Whether this machine has no GPU, judging by /dev alone, so that no import can use CUDA."""
    return not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists()


def _program(args: Any, cwd: Any) -> tuple[bool, tuple[str, str], list[str]] | None:
    """Whether `-u` was given, the program, and its arguments; None if it is not a plain start of this Python."""
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
    """Make this process the subreaper of its descendants, and restore the previous state at the end."""
    prctl, before = ctypes.CDLL(None).prctl, ctypes.c_int()
    prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def load(modules: Sequence[str] = TRAINING) -> None:
    """Import modules in this process, which `Preloaded` then forks. Call it before any thread starts.

    Args:
        modules: as for `Preloaded`.
    """
    global _loaded
    _installed[:] = [entry for entry in sys.path[1:] if entry not in _python_path(os.environ)]
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # otherwise libraries start threads when they are imported
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
    gc.freeze()  # keeps the imported modules in memory that all forks share
    _loaded = True


def _main() -> Never:
    """Run the preloaded process: import the modules of its command line, and serve its parent."""
    connection = Connection(int(sys.argv[1]))
    load(sys.argv[2:])
    _serve(connection)


def _detach() -> None:
    """Detach a forked preloaded process from its parent's streams, signal handlers and process group."""
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
        except (EOFError, OSError):  # the caller has ended
            os._exit(0)
        read_end, write_end = os.pipe()
        if (intermediate := os.fork()) == 0:
            intermediate = os.getpid()
            if os.fork():
                os._exit(0)
            _become(start, streams, write_end, intermediate)
        os.waitpid(intermediate, 0)
        for descriptor in (write_end, *streams):
            os.close(descriptor)
        with suppress(OSError), os.fdopen(read_end, "rb") as pipe:
            connection.send(int(pipe.read() or 0))


def _become(start: _Start, streams: Sequence[int], write_end: int, intermediate: int) -> Never:
    """Turn this fork into the program, run it, and exit.

    Args:
        write_end: of a pipe for the process id.
        intermediate: process id of the parent, which exits at once.
    """
    try:
        if start.group is None:
            os.setsid()
        else:
            os.setpgid(0, start.group)
        for descriptor, given in enumerate(streams):
            os.dup2(given, descriptor)
        os.write(write_end, str(os.getpid()).encode())
        while os.getppid() == intermediate:
            time.sleep(0.0005)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2:
                with suppress(OSError):  # the descriptor of the listing itself
                    os.close(int(name))
        _set_up_process(start)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    _exit(_run(start))


def _set_up_process(start: _Start) -> None:
    """Set everything that a new interpreter would have, except for imports."""
    os.umask(start.umask)
    os.chdir(start.folder)
    os.environ.clear()
    os.environ.update(start.environment)
    for number in signal.valid_signals() - _SET_BY_PYTHON - {signal.SIGKILL, signal.SIGSTOP}:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        with suppress(OSError):  # a signal that the C library reserves
            signal.signal(number, signal.SIG_IGN if number in start.ignored else default)
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
    """Use as many threads as torch would have chosen when it was imported."""
    if torch := sys.modules.get("torch"):
        given = environment.get("OMP_NUM_THREADS", "")
        count = int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))
        if count != torch.get_num_threads():
            torch.set_num_threads(count)


def _run(start: _Start) -> int | None:
    """Run the program; returns its exit status, None if Ctrl-C ended it."""
    option, name = start.source
    try:
        if option:
            sys.modules.pop(name, None)  # a new interpreter would not have imported the program's module
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


def _exit(status: int | None) -> Never:
    """Exit as an interpreter does, without unwinding the stack from before the fork."""
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
