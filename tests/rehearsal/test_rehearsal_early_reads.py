"""Late collectives on the pretended device."""

from pathlib import Path

import pytest
from rehearse import SKIP, rehearse

pytestmark = [pytest.mark.rehearsal, pytest.mark.run, SKIP]
PROGRAM = """
import torch
from early_reads import late_delivery
from launches import Launches
from layers import waits

torch.distributed.init_process_group("nccl")
given, came = torch.arange(4.0, device="cuda") + 4 * torch.distributed.get_rank(), torch.zeros(4, device="cuda")
before = waits()
with Launches() as counted, late_delivery():
    work = torch.distributed.all_to_all_single(came, given, async_op=True)
    early = came + given
    work.wait()
    late = came + given
print(f"counts {waits() - before} {counted.total.launches}\\n", end="")
print(f"early {early.tolist()} late {late.sum().item()}\\n", end="")
with late_delivery():
    torch.distributed.all_reduce(came, async_op=True)
"""


def test_an_early_read_of_a_collective_is_noticed_and_counts_are_as_without(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    status, out = rehearse(program, ranks=2)
    assert out.count("counts 0 2") == 2, out[-3000:]
    assert sorted(line for line in out.splitlines() if line.startswith("early")) == [
        "early [nan, nan, nan, nan] late 16.0",
        "early [nan, nan, nan, nan] late 40.0",
    ]
    assert status != 0 and out.count("AssertionError: never waited for: all_reduce (program.py:18)\n") >= 1
