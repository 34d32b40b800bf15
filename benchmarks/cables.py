"""Hosts as network namespaces of this machine, each with a cable to a switch; cables can be slow, and be cut.

Cables get their delay and rate from the kernel's netem. A kernel built without it gets, in place of the switch, this
file as a program: it takes frames from each cable and hands them on after as long as netem would hold them.
"""

import heapq
import os
import select
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

_PACKET, _VNET_HEADER, _OUTGOING = 263, 15, 4  # SOL_PACKET, PACKET_VNET_HDR, PACKET_OUTGOING of <linux/if_packet.h>
_HEADER = 10  # bytes; with it checksums and segments that were left to the hardware stay right
_LARGEST = 2**17
_PORT = 29500  # of the rendezvous, in a namespace of our own, where nothing else listens


class Network:
    """Namespaces that can be used as hosts, by address; in a `with` block, at whose end they are gone."""

    def __init__(self, cables: list[str], shell: Path) -> None:
        """Lay the cables.

        Args:
            cables: for each host what netem is told (`delay 2ms rate 200mbit`), for both directions; may be empty.
            shell: a file to make: the remote shell that leads to these hosts.
        """
        self._prefix = f"coe-{os.getpid()}-"
        self.hosts = [f"10.77.0.{number}" for number in range(1, len(cables) + 1)]
        self.shell = shell
        self._switch: subprocess.Popen | None = None
        shell.write_text(f'#!/bin/sh\nexec ip netns exec "{self._prefix}$1" sh -c "$2"\n')
        shell.chmod(0o755)
        self._cables = cables

    def __enter__(self) -> "Network":
        _ip("netns", "add", self._space("switch"))
        for number, host in enumerate(self.hosts):
            _ip("netns", "add", self._space(host))
            _ip("-n", self._space(host), "link", "set", "lo", "up")
            port = ("peer", "name", f"port{number}", "netns", self._space("switch"))
            _ip("-n", self._space(host), "link", "add", "eth0", "type", "veth", *port)
            _ip("-n", self._space(host), "addr", "add", f"{host}/24", "dev", "eth0")
            _ip("-n", self._space(host), "link", "set", "eth0", "up")
            self.join(host)
        if knows_netem(self._space("switch")):
            self._bridge()
        else:
            command = ["ip", "netns", "exec", self._space("switch"), sys.executable, __file__, *self._cables]
            self._switch = subprocess.Popen(command)
        return self

    def __exit__(self, *_: object) -> None:
        if self._switch:
            self._switch.kill()
            self._switch.wait()
        for process in self.processes():
            process.kill()
        for name in ("switch", *self.hosts):
            subprocess.run(["ip", "netns", "del", self._space(name)], check=False)

    def cut(self, host: str) -> None:
        """Pull a host's cable out of the switch."""
        _ip("-n", self._space("switch"), "link", "set", f"port{self.hosts.index(host)}", "down")

    def join(self, host: str) -> None:
        """Put it in again."""
        _ip("-n", self._space("switch"), "link", "set", f"port{self.hosts.index(host)}", "up")

    def processes(self) -> list[psutil.Process]:
        """What runs on the hosts."""
        listed = [_ip("netns", "pids", self._space(host)).split() for host in self.hosts]
        return [psutil.Process(int(pid)) for pids in listed for pid in pids if psutil.pid_exists(int(pid))]

    def _start(self, program: list[str], ranks_per_host: int) -> list[subprocess.Popen]:
        """Start so many ranks of a program on each host, with torchrun's variables; their output is dropped."""
        ranks = len(self.hosts) * ranks_per_host
        shared: dict[str, object] = {
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks_per_host,
            "GROUP_WORLD_SIZE": len(self.hosts),
        }
        shared |= {"MASTER_ADDR": self.hosts[0], "MASTER_PORT": _PORT, "OMP_NUM_THREADS": 1}
        shared |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # the hosts have no names, of which torch warns
        shared |= {"GLOO_SOCKET_IFNAME": "eth0"} if len(self.hosts) > 1 else {}
        started = []
        for rank in range(ranks):
            host, local = divmod(rank, ranks_per_host)
            own = {"RANK": rank, "LOCAL_RANK": local, "GROUP_RANK": host}
            environment = {**os.environ, **{name: str(value) for name, value in (shared | own).items()}}
            command = [str(self.shell), self.hosts[host], shlex.join(program)]
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        return started

    def run(self, program: list[str], ranks_per_host: int) -> bool:
        """Wait for so many ranks of a program on each host; whether none failed. The first failure ends all."""
        ranks = self._start(program, ranks_per_host)
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.2)
        if failed := any(rank.poll() for rank in ranks):
            for process in self.processes():
                process.kill()
        for rank in ranks:
            rank.wait()
        return not failed

    def _bridge(self) -> None:
        _ip("-n", self._space("switch"), "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._space("switch"), "link", "set", "bridge", "up")
        for number, (host, cable) in enumerate(zip(self.hosts, self._cables, strict=True)):
            _ip("-n", self._space("switch"), "link", "set", f"port{number}", "master", "bridge")
            for space, device in ((host, "eth0"), ("switch", f"port{number}")) if cable else ():
                command = ["tc", "-n", self._space(space), "qdisc", "add", "dev", device, "root", "netem"]
                subprocess.run([*command, *cable.split()], check=True)

    def _space(self, name: str) -> str:
        return f"{self._prefix}{name}"


def unable() -> str | None:
    """Why there can be no such network here; None if there can."""
    if missing := next((program for program in ("ip", "tc") if shutil.which(program) is None), None):
        return f"no program {missing} (package iproute2)"
    name = f"coe-{os.getpid()}-probe"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    except subprocess.CalledProcessError as error:
        return f"no network namespaces: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
    return None


def knows_netem(space: str) -> bool:
    """Whether the kernel has netem; leaves nothing behind."""
    command = ["tc", "-n", space, "qdisc", "replace", "dev", "lo", "root", "netem", "delay", "1ms"]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class _Cable:
    """One port of the switch. A frame waits its turn at the rate, and then the delay, as netem has it."""

    def __init__(self, port: str, spelled: str) -> None:
        words = spelled.split()
        told = dict(zip(words[::2], words[1::2], strict=True))
        self.delay = float(told.get("delay", "0ms").removesuffix("ms")) / 1e3
        self.seconds_a_byte = 8 / (float(told["rate"].removesuffix("mbit")) * 1e6) if "rate" in told else 0.0
        self.free_at = {"in": 0.0, "out": 0.0}
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
        self.socket.setsockopt(_PACKET, _VNET_HEADER, 1)
        self.socket.bind((port, 0))

    def passed(self, frame: bytes, way: str, begins: float) -> float:
        """When a frame that begins its way then has come through."""
        self.free_at[way] = max(begins, self.free_at[way]) + len(frame) * self.seconds_a_byte
        return self.free_at[way] + self.delay

    def take(self) -> bytes | None:
        """A frame that the host has sent; None for one of our own, or from a cable that is cut."""
        try:
            frame, (_, _, kind, _, _) = self.socket.recvfrom(_LARGEST)
        except OSError:
            return None
        return None if kind == _OUTGOING else frame

    def give(self, frame: bytes) -> None:
        try:
            self.socket.send(frame)
        except OSError:  # the cable is cut
            return


def switch(cables: list[_Cable]) -> None:
    """Hand frames on to where their receiver was last heard of, else to all others, for ever."""
    heard: dict[bytes, _Cable] = {}
    waiting: list[tuple[float, int, bytes, _Cable]] = []
    count = 0
    while True:
        patience = max(waiting[0][0] - time.monotonic(), 0) if waiting else None
        ready = select.select([cable.socket for cable in cables], [], [], patience)[0]
        for cable in (cable for cable in cables if cable.socket in ready):
            if frame := cable.take():
                receiver, sender = frame[_HEADER : _HEADER + 6], frame[_HEADER + 6 : _HEADER + 12]
                heard[sender] = cable
                through = cable.passed(frame, "in", time.monotonic())
                for target in [heard[receiver]] if receiver in heard else [c for c in cables if c is not cable]:
                    count += 1
                    heapq.heappush(waiting, (target.passed(frame, "out", through), count, frame, target))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, frame, target = heapq.heappop(waiting)
            target.give(frame)


if __name__ == "__main__":
    switch([_Cable(f"port{number}", spelled) for number, spelled in enumerate(sys.argv[1:])])
