"""Lists and files of hosts, and what is said of a mistake in them."""

import os
from pathlib import Path

import pytest

from coe_megatron.errors import ConfigError
from coe_megatron.launcher.hosts import Host, from_file, from_list, ranks_per_node


def test_a_list() -> None:
    hosts = from_list("a, b:8,user@c.d-e_1:2")
    assert hosts == [Host("a"), Host("b", 8), Host("user@c.d-e_1", 2)]
    assert hosts[2].address == "c.d-e_1"


def test_a_file_as_mpi_and_deepspeed_have_it(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# the rack\n\nnode-1 slots=8\nnode-2   slots=8  # new\n  node-3\n")
    assert from_file(file) == [Host("node-1", 8), Host("node-2", 8), Host("node-3")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' in --hosts: '' is not a host name"),
        ("a,,b", "'' in --hosts: '' is not a host name"),
        ("-oProxyCommand=x", "'-oProxyCommand=x' is not a host name"),
        ("a;b", "'a;b' is not a host name"),
        ("a:0", "'a:0' in --hosts: slots is '0': it must be a whole number from 1"),
        ("a:", "slots is ''"),
        ("a:1:2", "slots is '1:2'"),
        ("a,b,x@a", "a is given twice"),
    ],
)
def test_mistakes_in_a_list(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^.*\Z") as refused:
        from_list(text)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# none\n", "it names no host"),
        ("a\nb gpus=8\n", "line 2: 'gpus=8' is unknown after b: only slots=N is valid there"),
        ("a slots=x\n", "line 1: slots is 'x': it must be a whole number from 1 to 4096"),
        ("a slots=1\na slots=1\n", "a is given twice"),
    ],
)
def test_mistakes_in_a_file(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"^.*\Z") as refused:
        from_file(file)
    assert says in str(refused.value)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize(
    ("hosts", "requested", "count"), [("a,b", None, 1), ("a:4,b:4", None, 4), ("a:4,b:8", 2, 2), ("a", 3, 3)]
)
def test_ranks_of_a_host(hosts: str, requested: int | None, count: int) -> None:
    assert ranks_per_node(from_list(hosts), requested) == count


@pytest.mark.parametrize(
    ("hosts", "requested", "says"),
    [
        ("a:4,b:8", None, "slots differ (a=4, b=8): give all hosts the same number, or --ranks"),
        ("a:4,b", None, "slots differ (a=4, b=not given)"),
        ("a:4,b:8", 5, "--ranks-per-node is 5, but a has 4 slots"),
    ],
)
def test_ranks_that_do_not_fit(hosts: str, requested: int | None, says: str) -> None:
    with pytest.raises(ValueError) as refused:
        ranks_per_node(from_list(hosts), requested)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("folder", "it is a folder, where a file is needed"),
        ("pipe", "it is a special file, where a file is needed"),
        ("link", "it is a dangling link to nowhere"),
        ("long", "file name too long"),
        ("bytes", "it is not UTF-8 text"),
        ("large", "it has more than"),
    ],
)
def test_a_host_file_that_is_none(kind: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / ("h" * 300 if kind == "long" else "hosts")
    match kind:
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "link":
            file.symlink_to("nowhere")
        case "bytes":
            file.write_bytes(b"\xff\xfe")
        case "large":
            file.write_bytes(b"#" * (1 << 23))
    with pytest.raises(ConfigError, match=r"^--hostfile is .*: ") as refused:
        from_file(file)
    assert says in str(refused.value)
