"""Torchrun across two hosts with a slow cable between them, which is cut for a moment and for long."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cables import Network
from programs import Program, losses, wait_for_step

from coe_megatron.run.exit_status import ExitStatus

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(600)]
Arguments = Callable[[Path], list[str]]


def start(network: Network, arguments: list[str], log: Path, *options: str) -> Program:
    """launch/multi_host.py on these hosts; its output goes to a file."""
    hosts = ("--hosts", ",".join(network.hosts), "--remote-shell", str(network.shell))
    command = [sys.executable, "launch/multi_host.py", *hosts, *options, *arguments]
    with log.open("w") as out:
        return Program(command, stdout=out, stderr=out)


def test_neither_a_slow_network_nor_a_cable_that_is_cut_for_five_seconds_changes_a_loss(
    two_hosts: Network, arguments: Arguments, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    with start(two_hosts, arguments(folder), log) as running:
        wait_for_step(folder, 7, running)
        two_hosts.cut(two_hosts.hosts[1])
        time.sleep(5)
        two_hosts.join(two_hosts.hosts[1])
        assert running.wait() == ExitStatus.DONE, log.read_text()
    assert losses(folder) == undisturbed
    assert f"{two_hosts.hosts[0]}: validation loss" in log.read_text()
    assert two_hosts.processes() == []


def test_a_cable_that_stays_cut_ends_all_ranks_and_the_same_command_goes_on(
    two_hosts: Network, arguments: Arguments, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    command = [*arguments(folder), "recovery.hang_after=15"]
    with start(two_hosts, command, log) as running:
        wait_for_step(folder, 12, running)
        two_hosts.cut(two_hosts.hosts[1])
        assert running.wait() == ExitStatus.HUNG, log.read_text()
    assert two_hosts.processes() == []
    assert sorted(file.name for file in (folder / "stacks").iterdir()) == ["rank-00000.txt", "rank-00001.txt"]
    for host in two_hosts.hosts:  # on both sides of the cut
        assert f"{host}: one_host.py: ended with status 7 (HUNG)" in log.read_text()
    two_hosts.join(two_hosts.hosts[1])
    with start(two_hosts, command, log) as running:
        assert running.wait() == ExitStatus.DONE, log.read_text()
    assert json.loads((folder / "run.json").read_text())["attempts"][-1]["outcome"] == "finished"
    assert losses(folder) == undisturbed
