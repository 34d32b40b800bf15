"""What programs print where it cannot be printed: a full disk, and a terminal without the characters."""

import os
import subprocess
import sys
from typing import Any

import pytest
from programs import ROOT

STATUS = [sys.executable, "launch/status.py", "configs"]
SKIPPED = "import sys; from coe_megatron.cli.arguments import write_out; sys.exit(not write_out('zu gro\\u00df'))"


def run(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60, **more)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here to be full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = run(STATUS, stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: standard output cannot be written: No space left on device\n")


def test_a_terminal_without_a_character() -> None:
    done = run([sys.executable, "-c", SKIPPED], stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "zu gro\\xdf\n", "")
