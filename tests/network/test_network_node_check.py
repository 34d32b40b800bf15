"""The node check on three hosts, of which one is bad."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cables import Network
from programs import ROOT, Program

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(600)]


def check(network: Network, output: Path, *options: str, first: dict[str, str] | None = None) -> tuple[Any, list[int]]:
    """The report, and the exit status of each host that takes part.

    Args:
        first: by host what its shell does before; a host that is not in it does nothing, None means all take part.
    """
    report, before = output.parent / "report.json", dict.fromkeys(network.hosts, "true") if first is None else first
    program = [
        sys.executable,
        str(ROOT / "launch" / "check_nodes.py"),
        "--output",
        str(output),
        "--report",
        str(report),
    ]
    program += ["--nodes", ",".join(network.hosts), "--rendezvous", f"{network.hosts[0]}:29400", *options]
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                Program([str(network.shell), host, f"{act} && exec {shlex.join([*program, '--name', host])}"])
            )
            for host, act in before.items()
        ]
        statuses = [process.wait() for process in running]
    return json.loads(report.read_text()) if report.exists() else None, statuses


def test_a_slow_cable_is_found_at_its_own_host(network: Callable[..., Network], tmp_path: Path) -> None:
    with network("", "delay 4ms rate 20mbit", "") as hosts:
        report, statuses = check(hosts, tmp_path / "run")
        slow = hosts.hosts[1]
    assert list(report["bad"]) == [slow]
    assert "slow: all-to-all" in report["bad"][slow]
    assert report["nodes"][slow]["all_to_all"] < 20e6 / 8 / 1e9
    assert report["all_nodes"]["all_reduce"] > 0
    latency = {host: node["latency"] for host, node in report["nodes"].items()}
    assert all((seconds > 4e-3) == (host == slow) for host, seconds in latency.items()), latency
    assert 0 < report["all_nodes"]["latency"] < 4e-3, "over the good ones"
    assert statuses == [1, 0, 0]
    assert list((tmp_path / "run").iterdir()) == []


def test_a_full_disk_and_a_host_that_never_comes_are_named(network: Callable[..., Network], tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    with network("", "", "") as hosts:
        leads, full, missing = hosts.hosts
        first = {leads: "true", full: f"mount -t tmpfs -o size=64k none {output}"}  # for this host's processes alone
        report, statuses = check(hosts, output, "--timeout", "30", first=first)
    assert set(report["bad"]) == {full, missing}
    assert "No space left on device" in report["bad"][full]
    assert "GiB are free, 1 are needed" in report["bad"][full]
    assert report["bad"][missing] == "does not answer within 30 s"
    assert abs(report["nodes"][full]["skew"] or 0) < 1
    assert statuses == [1, 0]


def test_without_the_first_host_the_others_say_so_and_end(network: Callable[..., Network], tmp_path: Path) -> None:
    with network("", "") as hosts:
        report, statuses = check(hosts, tmp_path / "run", "--timeout", "2", first={hosts.hosts[1]: "true"})
    assert (report, statuses) == (None, [1])


def test_a_bad_host_is_excluded_before_a_run(
    network: Callable[..., Network], arguments: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    with network("delay 1ms rate 2mbit", "", "") as hosts:
        options = ("--hosts", ",".join(hosts.hosts), "--remote-shell", str(hosts.shell), "--check", "exclude")
        train = [*arguments(tmp_path / "run"), "training.steps=2", "parallel.expert=1", "training.global_batch=24"]
        command = [sys.executable, str(ROOT / "launch" / "multi_host.py"), *options, *train]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"excluded: {hosts.hosts[0]}: slow: " in done.stdout
    assert f"{hosts.hosts[1]}: validation loss" in done.stdout
