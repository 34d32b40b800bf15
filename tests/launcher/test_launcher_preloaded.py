"""A program forked from a preloaded process, against the same program started afresh."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from programs import ROOT

from coe_megatron.launcher.preloaded import Popen, Preloaded

LOOK = """
import json, os, signal, sys, threading
import beside
print(json.dumps({
    "argv": sys.argv, "name": __name__, "main": sys.modules["__main__"].__dict__ is globals(), "cwd": os.getcwd(),
    "path": sys.path, "environment": dict(os.environ), "parent": os.getppid(), "session": os.getsid(0) == os.getpid(),
    "group": os.getpgrp() if len(sys.argv) == 1 else None, "umask": os.umask(0), "stdin": sys.stdin.read(),
    "files": sorted(os.listdir("/proc/self/fd"))[:3], "threads": threading.active_count(),
    "handlers": {int(each): str(signal.getsignal(each)) for each in signal.valid_signals()},
}))
"""


@pytest.fixture(scope="module")
def preloaded() -> Iterator[Preloaded]:
    with Preloaded(["wave", "logging:getLogger"]) as process:
        yield process


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], list[str]]:
    """The command that runs a text as a program."""

    def write(text: str) -> list[str]:
        (tmp_path / "program.py").write_text(text)
        (tmp_path / "beside.py").touch()
        return [sys.executable, str(tmp_path / "program.py")]

    return write


def run(command: list[str], preloaded: Preloaded | None, **more: Any) -> tuple[int, str, str]:
    piped = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with Popen(command, preloaded, text=True, **piped, **more) as process:
        out, err = process.communicate("said", timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("own_session", [False, True])
def test_it_looks_as_if_started_afresh(
    own_session: bool, preloaded: Preloaded, program: Callable[[str], list[str]], tmp_path: Path
) -> None:
    (tmp_path / "modules").mkdir()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{tmp_path / 'modules'}", "LC_ALL": "C.UTF-8"}
    more = {"cwd": tmp_path, "env": environment, "start_new_session": own_session}
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        for arguments in (program(LOOK), [sys.executable, "-u", "program.py", "word", "--option"],
                          [sys.executable, "-m", "program", "word"]):  # fmt: skip
            (forked, forked_out, forked_err), (fresh, out, err) = (
                run(arguments, which, **more) for which in (preloaded, None)
            )
            assert (forked, fresh, forked_err, err) == (0, 0, "", "")
            found, expected = json.loads(forked_out), json.loads(out)
            assert found["parent"] == os.getpid() and found["session"] == own_session and found["stdin"] == "said"
            if own_session:
                del found["group"], expected["group"]
            if arguments[1] == "-m":  # a fresh one has the whole path
                assert Path(found["argv"].pop(0)).stem == Path(expected["argv"].pop(0)).stem
            assert found == expected
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_was_imported_is_there(preloaded: Preloaded, program: Callable[[str], list[str]]) -> None:
    command = program("import sys; print('wave' in sys.modules)")
    assert [run(command, which)[1] for which in (preloaded, None)] == ["True\n", "False\n"]


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("raise SystemExit('no more')", 1, "no more\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os; os._exit(130)", 130, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)", -signal.SIGINT, "Keybo"),
        ("import atexit, sys; atexit.register(print, 'at the end', file=sys.stderr)", 0, "at the end\n"),
        ("import sys, threading; threading.Timer(0.1, sys.stderr.write, ['late']).start()", 0, "late"),
    ],
)  # fmt: skip
def test_it_ends_as_a_fresh_one(
    text: str, status: int, said: str, preloaded: Preloaded, program: Callable[[str], list[str]]
) -> None:
    for which in (preloaded, None):
        found, _, err = run(program(text), which)
        assert found == status and said in err and bool(said) == bool(err)


def test_other_programs_and_options_are_started_afresh(preloaded: Preloaded, tmp_path: Path) -> None:
    loaded = "import sys; print('wave' in sys.modules)"
    assert run([sys.executable, "-c", loaded], preloaded)[1] == "False\n"
    assert run(["echo", "word"], preloaded)[1] == "word\n"
    status, _, err = run([sys.executable, str(tmp_path / "nowhere.py")], preloaded)
    assert status == 2 and "can't open file" in err


def test_without_the_preloaded_process_programs_are_started_afresh(program: Callable[[str], list[str]]) -> None:
    before = set(psutil.Process().children())
    with Preloaded(["wave"]) as preloaded:
        (server,) = set(psutil.Process().children()) - before
        loaded = program("import sys; print('wave' in sys.modules)")
        assert run(loaded, preloaded)[1] == "True\n"
        server.kill()
        assert run(loaded, preloaded)[1] == "False\n"
    assert run(loaded, preloaded)[1] == "False\n"


STARTS = """
import os, signal, sys, time
from coe_megatron.launcher.preloaded import Popen, Preloaded
from coe_megatron.training.signals import stop_with_parent
if len(sys.argv) == 1:
    with Preloaded(["wave"]) as preloaded:
        inner = Popen([sys.executable, sys.argv[0], "inner"], preloaded, start_new_session=True)
        os.write(1, b"%d\\n" % inner.pid)  # at once: the other process writes there too
        inner.wait()
else:
    stop_with_parent()
    os.write(1, b"%s %d\\n" % (b"loaded" if "wave" in sys.modules else b"fresh", os.getppid()))
    time.sleep(60)
"""


@pytest.mark.parametrize("nested", [False, True])
def test_nothing_outlives_a_starter_that_is_killed(
    nested: bool, preloaded: Preloaded, program: Callable[[str], list[str]]
) -> None:
    """Also one that was forked itself, and forks on from there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = program(STARTS)
    with Popen(command, preloaded if nested else None, stdout=subprocess.PIPE, text=True, env=environment) as outer:
        assert outer.stdout is not None
        inner, said = (outer.stdout.readline().split() for _ in range(2))
        if inner[0] == "loaded":
            inner, said = said, inner
        assert said == ["loaded", str(outer.pid)]
        below = [psutil.Process(outer.pid), *psutil.Process(outer.pid).children(recursive=True)]
        assert len(below) == 3 and int(inner[0]) in {each.pid for each in below}
        outer.kill()
        outer.wait()
    deadline = time.monotonic() + 20
    while any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in below):
        assert time.monotonic() < deadline
        time.sleep(0.01)
