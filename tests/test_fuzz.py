"""The fuzzer finds what is planted; each of its targets stands some seconds of it, and all that was found before.

A soak by hand: `python tests/fuzz.py TARGET --minutes 30`. What it finds is mended, and its input then goes into
fuzz_corpus.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fuzz
import fuzz_values as values
import pytest
from fuzz_bounds import Bounds, Case, Link, attempt, changed, judge, memory_limit
from fuzz_targets import Target
from hypothesis import strategies as st
from programs import python

from coe_megatron.errors import ConfigError

CORPUS = Path(__file__).parent / "fuzz_corpus"
SECONDS = 8.0
TIGHT = Bounds(cpu_seconds=0.3, idle_seconds=1.0, memory=40 << 20)


def hang() -> list[str]:
    while True:
        pass


def hang_and_catch() -> list[str]:
    try:
        return hang()
    except Exception:
        return []


def wait() -> list[str]:
    read, write = os.pipe()
    os.read(read, 1)  # nobody writes
    return [str(write)]


def bloat() -> list[str]:
    return [] if bytes(range(256)) * (1 << 18) else ["x"]


def bloat_and_catch() -> list[str]:
    try:
        bytearray(1 << 40)
    except MemoryError:
        raise ConfigError("key is too large") from None
    return []


def lookup() -> list[str]:
    return [{"a": "key"}["b"]]


def number() -> list[str]:
    return [str(int("key"))]


def leave() -> list[str]:
    sys.exit(1)


PLANTED: dict[str, Callable[[], list[str]]] = {
    "too slow, test_fuzz.py: hang": hang_and_catch,
    "too slow, test_fuzz.py: wait": wait,
    "too much memory": bloat,
    "KeyError, test_fuzz.py: lookup": lookup,
    "ValueError, test_fuzz.py: number": number,
    "SystemExit, test_fuzz.py: leave": leave,
    "a refusal that is not one printable line": lambda: ["key is\nwrong"],
    "a refusal that names nothing": lambda: ["it is wrong"],
    "a refusal of more than 2000 characters": lambda: ["key" * 1000],
}
KILLED = "the process was ended by SIGSEGV"


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_mistake_is_found(kind: str) -> None:
    verdict = judge(PLANTED[kind], ["key"], TIGHT)
    assert verdict.is_finding and verdict.kind == kind


def test_memory_that_is_refused_and_caught_is_found() -> None:
    with memory_limit(1 << 30):
        assert judge(bloat_and_catch, ["key"]).kind == "too much memory"


def test_what_is_declared_is_no_finding() -> None:
    def refuse() -> None:
        raise ConfigError("key is wrong")

    assert judge(list, ["key"]).kind == "accepted"
    assert judge(lambda: attempt(refuse), ["key"]).kind == "refused"


def test_a_case_is_put_in_place_and_taken_away(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    case = Case({"a": None, "b": b"\x00\xff", "c": Link("/dev/null")}, {"skip": "\udcff"})
    assert Case.of(case.as_dict()) == case
    with changed(tmp_path, case):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
        assert (tmp_path / "b").read_bytes() == b"\x00\xff" and (tmp_path / "c").is_symlink()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


class Planted(Target):
    """Now and then one of the planted mistakes, or the end of the process."""

    names = ("key",)
    bounds = TIGHT

    def cases(self) -> st.SearchStrategy[Case]:
        kinds = values.rarely(st.just(KILLED), st.sampled_from([*[""] * 10, *PLANTED]), 15)
        options = st.fixed_dictionaries({"kind": kinds, "more": st.integers()})
        return st.builds(Case, st.fixed_dictionaries({"file": st.binary()}), options)

    def act(self, folder: Path, case: Case) -> list[str]:
        if (kind := case.options.get("kind", "")) == KILLED:
            os.kill(os.getpid(), signal.SIGSEGV)
        return PLANTED[kind]() if kind else []


@pytest.mark.slow
@pytest.mark.run
def test_it_goes_on_after_every_finding_and_saves_the_smallest_input(tmp_path: Path) -> None:
    soak = fuzz.Soak(fuzz.Summary("test_fuzz:Planted", 1), tmp_path)
    deadline = time.monotonic() + 200  # of a busy machine
    while (found := soak.run(soak.summary.seconds + 4).as_dict())["findings"].keys() != {*PLANTED, KILLED}:
        assert time.monotonic() < deadline, found
    assert found["ended"]["accepted"] > 10 and sum(found["ended"].values()) == found["tries"]
    again = fuzz.replay([Path(found["findings"]["KeyError, test_fuzz.py: lookup"])])
    ((path, verdict),) = again.items()
    assert verdict.kind == "KeyError, test_fuzz.py: lookup"
    assert json.loads(path.read_text())["files"] == {"file": ""}
    assert "KeyError: 'b'" in path.with_suffix(".txt").read_text()


@pytest.mark.slow
@pytest.mark.run
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_some_seconds_find_nothing(target: str, tmp_path: Path) -> None:
    found = fuzz.Soak(fuzz.Summary(target, 1), tmp_path, minimise=False).run(SECONDS).as_dict()
    told = [Path(path).with_suffix(".txt").read_text()[-2000:] for path in found["findings"].values()]
    assert not told, [*found["findings"], *told]
    assert found["accepted_share"] >= 0.05, "too few tries come behind the first check"


@pytest.mark.run
def test_what_was_found_before_is_mended() -> None:
    files = sorted(CORPUS.glob("*.json"))
    done = python("tests/fuzz.py", "--replay", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files and {line.split(": ")[0] for line in done.stdout.splitlines()} >= {file.name for file in files}
