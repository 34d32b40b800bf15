"""Temporary files go with their program, and those of one that was killed with the next."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coe_megatron import scratch
from coe_megatron.errors import ConfigError

# Enters, leaves a file where temporary files go, says where, and waits for its stdin to end.
PROGRAM = """
import sys, tempfile
from pathlib import Path
from coe_megatron import scratch
logs = Path(sys.argv[1]) if len(sys.argv) > 1 else None
folder = scratch.enter(logs)
tempfile.mkstemp()
print(folder, flush=True)
sys.stdin.read()
"""


def start(place: Path, *arguments: object, **more: str) -> tuple[subprocess.Popen[str], Path]:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    environment = {**os.environ, "TMPDIR": str(place), **more}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str], kill: bool = False) -> None:
    if kill:
        process.kill()
    process.communicate(timeout=60)


def left(place: Path) -> list[str]:
    """Folders of runs that are there still."""
    return sorted(str(path.relative_to(place)) for path in place.glob("*/run-*"))


def test_at_its_end_nothing_is_left(tmp_path: Path) -> None:
    process, folder = start(tmp_path)
    assert folder.parent == tmp_path / f"coe-{os.getuid()}" and len(list(folder.iterdir())) == 1
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    end(process)
    assert left(tmp_path) == []


def test_what_a_killed_one_left_goes_with_the_next_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    killed, remains = start(tmp_path)
    living, stays = start(tmp_path)
    end(killed, kill=True)
    assert remains.exists()
    following, _ = start(tmp_path)
    assert not remains.exists() and stays.exists()
    end(following)
    end(living)
    assert left(tmp_path) == []


def test_ranks_share_their_launchers_folder_which_stays_until_the_last_has_ended(tmp_path: Path) -> None:
    launcher, folder = start(tmp_path)
    rank, same = start(folder)
    assert same == folder
    end(launcher, kill=True)
    following, _ = start(tmp_path)
    assert folder.exists()
    end(rank)
    end(following)
    end(start(tmp_path)[0])
    assert left(tmp_path) == []


def test_torchruns_own_logs_go_when_it_has_ended(tmp_path: Path) -> None:
    """Its folder is in the usual place, and has a name that says whose it is; others are let alone."""
    mine, others = tmp_path / "torchelastic_abc", tmp_path / "torchelastic_def"
    mine.mkdir()
    others.mkdir()
    run = (
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {PROGRAM!r}, sys.argv[1]], stdin=subprocess.DEVNULL, check=True)\n"
        "end = subprocess.run([sys.executable, '-c', 'from coe_megatron import scratch; scratch.enter()'])\n"
        "print(end.returncode, flush=True)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", run, mine], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("\n0\n")
    assert mine.exists()  # torchrun, here the program above the rank, was there still
    end(start(tmp_path)[0])
    assert (mine.exists(), others.exists(), left(tmp_path)) == (False, True, [])


@pytest.mark.parametrize("kind", ["file", "link", "open to all"])
def test_a_folder_that_another_may_have_made_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / f"coe-{os.getuid()}"
    if kind == "file":
        home.write_text("")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        home.symlink_to(tmp_path / "elsewhere")
    else:
        home.mkdir()
        home.chmod(0o777)
    monkeypatch.setattr(scratch, "_usual_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match=r"^the folder for temporary files \(TMPDIR\) is .*: it "):
        scratch.enter()
