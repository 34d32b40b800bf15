"""One try of a fuzz target: what it gets, and how it ended, judged within bounds of time and memory."""

import faulthandler
import json
import linecache
import resource
import signal
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = str(Path(__file__).parents[1] / "coe_megatron")
LONGEST = 2_000  # characters of a refusal
Result = Callable[[], list[str]]


class OutOfTime(BaseException):
    """No Exception: the code under test may catch those."""


@dataclass(frozen=True)
class Link:
    """A symbolic link, in the place of a file."""

    to: str


Content = bytes | Link | None  # None: nothing is there


@dataclass(frozen=True)
class Case:
    """The input of a try: files changed in the target's folder, and what else the target wants to know."""

    files: Mapping[str, Content] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes as the text of the same code points, links as objects."""
        files = {name: _as_json(content) for name, content in self.files.items()}
        return {"files": files, "options": dict(self.options)}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Case":
        """From what `as_dict` made."""
        return cls({name: _of_json(content) for name, content in saved["files"].items()}, saved["options"])

    @property
    def size(self) -> int:
        """Characters when saved."""
        return len(json.dumps(self.as_dict()))


class Refusal(str):
    """A line that says what is wrong, and the function that says so."""

    where = ""


@dataclass(frozen=True)
class Bounds:
    """What a try may take.

    Attributes:
        cpu_seconds: of this process: a machine that is busy with other things slows no try down.
        idle_seconds: that pass without work, as in reading from a pipe; to wait for its turn on a busy machine is work.
        memory: bytes by which the resident memory may grow.
    """

    cpu_seconds: float = 2.0
    idle_seconds: float = 20.0
    memory: int = 300 << 20


@dataclass(frozen=True)
class Verdict:
    """How a try ended.

    Attributes:
        kind: `accepted`, `refused`, or in a few words what was found: the same words for what is likely the same fault.
        text: the refusals, or the traceback.
    """

    kind: str
    text: str = ""

    @property
    def is_finding(self) -> bool:
        """Whether the code under test is at fault."""
        return self.kind not in ("accepted", "refused")


def judge(action: Result, names: Collection[str], bounds: Bounds = Bounds()) -> Verdict:
    """Do a try, and say how it ended.

    Args:
        action: returns what was refused, in a line each, or raises it; an empty list says that all was accepted.
        names: every refusal must hold one of them.
    """
    before = _reset_peak()
    began = time.process_time()
    try:
        with _limited(bounds):
            refusals = action()
        verdict = next(filter(None, (_unclear(text, names) for text in refusals)), None)
        verdict = verdict or Verdict("refused" if refusals else "accepted", "\n".join(refusals))
    except OutOfTime as error:
        verdict = Verdict(f"too slow, {_where(error)}", _told(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        verdict = _verdict_on(error, names)
    if verdict.is_finding:
        return verdict
    if (took := time.process_time() - began) > bounds.cpu_seconds + 0.1:
        return Verdict("too slow, and nothing stops it", f"{took:.1f} s of CPU time; then: {verdict}")
    if (grown := _resident("VmHWM") - before) > bounds.memory:
        return Verdict("too much memory", f"{grown >> 20} MiB; then: {verdict}")
    return verdict


def attempt(action: Callable[[], object]) -> list[str]:
    """The declared error of one of several calls in a try, as a list of at most one refusal."""
    try:
        action()
    except Exception as error:
        if not _is_declared(error) or _out_of_memory(error):
            raise
        return [_refusal(error)]
    return []


@contextmanager
def memory_limit(spare: int) -> Iterator[None]:
    """Let this process take so many bytes more than it has; the next one is a MemoryError."""
    earlier = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_resident("VmData") + spare, earlier[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, earlier)


@contextmanager
def changed(folder: Path, case: Case) -> Iterator[None]:
    """A folder with the files of a case; afterwards it is as before."""
    before = {name: _content(folder / name) for name in case.files}
    try:
        for name, content in case.files.items():
            _put(folder / name, content)
        yield
    finally:
        for name, content in before.items():
            _put(folder / name, content)


def _verdict_on(error: BaseException, names: Collection[str]) -> Verdict:
    if _out_of_memory(error):
        return Verdict("too much memory", _told(error))
    if _is_declared(error):
        return _unclear(_refusal(error), names) or Verdict("refused", str(error))
    return Verdict(f"{type(error).__name__}, {_where(error)}", _told(error))


def _unclear(text: str, names: Collection[str]) -> Verdict | None:
    """What is wrong with a refusal."""
    where = f", {text.where}" if isinstance(text, Refusal) else ""
    if not text.strip() or not text.isprintable():
        return Verdict(f"a refusal that is not one printable line{where}", repr(text))
    if len(text) > LONGEST:
        return Verdict(f"a refusal of more than {LONGEST} characters{where}", text)
    if not any(name in text for name in names):
        return Verdict(f"a refusal that names nothing{where}", text)
    return None


def _refusal(error: BaseException) -> Refusal:
    refusal = Refusal(error)
    refusal.where = _where(error)
    return refusal


def _is_declared(error: BaseException) -> bool:
    """A ValueError that our code raises; one of a library or of a built-in is at best an accident."""
    if isinstance(error, ValueError) and type(error).__module__.startswith("coe_megatron."):
        return True
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    name = frame.f_code.co_filename
    ours = name.startswith(PACKAGE) and linecache.getline(name, line).strip().startswith("raise")
    return ours and type(error) is ValueError


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether it is a MemoryError, or was raised where one was caught."""
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def _where(error: BaseException) -> str:
    """The innermost function of ours that an error went through, else the innermost of all."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    codes = [code for code in codes if code.co_filename != __file__]
    code = ([code for code in codes if code.co_filename.startswith(PACKAGE)] or codes)[-1]
    return f"{Path(code.co_filename).name}: {code.co_qualname}"


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=-30))[-20_000:]


@contextmanager
def _limited(bounds: Bounds) -> Iterator[None]:
    """Raise OutOfTime in what follows, again and again: in a destructor it would be lost.

    Where no Python code runs any more, the kernel ends the process (SIGXCPU), or faulthandler does.
    """
    spent, armed = time.process_time(), True

    def expire(number: int, _: object) -> None:
        nonlocal spent
        before, spent = spent, time.process_time()
        if armed and (number == signal.SIGPROF or spent - before < bounds.idle_seconds / 100):
            raise OutOfTime

    handlers = {number: signal.signal(number, expire) for number in (signal.SIGPROF, signal.SIGALRM)}
    limit = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent + bounds.cpu_seconds + 10), limit[1]))
    faulthandler.dump_traceback_later(600, exit=True)
    earlier = {
        signal.ITIMER_PROF: signal.setitimer(signal.ITIMER_PROF, bounds.cpu_seconds, 0.5),
        signal.ITIMER_REAL: signal.setitimer(signal.ITIMER_REAL, bounds.idle_seconds, bounds.idle_seconds),
    }
    try:
        try:
            yield
        finally:
            armed = False
    finally:  # also where time was out just before that
        armed = False
        for timer, values in earlier.items():  # pytest-timeout has one
            signal.setitimer(timer, *values)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_CPU, limit)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _reset_peak() -> int:
    """Bytes of resident memory, which are now the peak too."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


def _content(path: Path) -> Content:
    if path.is_symlink():
        return Link(str(path.readlink()))
    return path.read_bytes() if path.is_file() else None


def _put(path: Path, content: Content) -> None:
    path.unlink(missing_ok=True)
    if isinstance(content, Link):
        path.symlink_to(content.to)
    elif content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _as_json(content: Content) -> Any:
    return {"link": content.to} if isinstance(content, Link) else None if content is None else content.decode("latin-1")


def _of_json(saved: Any) -> Content:
    if isinstance(saved, dict):
        return Link(saved["link"])
    return None if saved is None else saved.encode("latin-1")
