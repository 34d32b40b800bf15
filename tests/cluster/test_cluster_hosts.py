"""Lists and files of hosts, and what is said of a mistake in them."""

from pathlib import Path

import pytest

from coe_megatron.cluster.hosts import Host, from_file, from_list, ranks_per_node


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
        ("", "'' in --hosts: '' is no name of a host"),
        ("a,,b", "'' in --hosts: '' is no name of a host"),
        ("-oProxyCommand=x", "'-oProxyCommand=x' is no name of a host"),
        ("a;b", "'a;b' is no name of a host"),
        ("a:0", "'a:0' in --hosts: slots are '0': they must be a number of at least 1"),
        ("a:", "slots are ''"),
        ("a:1:2", "slots are '1:2'"),
        ("a,b,x@a", "a stands there twice"),
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
        ("a\nb gpus=8\n", "line 2: 'gpus=8' is unknown after b: only slots=N may stand there"),
        ("a slots=x\n", "line 1: slots are 'x'"),
        ("a slots=1\na slots=1\n", "a stands there twice"),
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
    ("hosts", "asked", "count"), [("a,b", None, 1), ("a:4,b:4", None, 4), ("a:4,b:8", 2, 2), ("a", 3, 3)]
)
def test_ranks_of_a_host(hosts: str, asked: int | None, count: int) -> None:
    assert ranks_per_node(from_list(hosts), asked) == count


@pytest.mark.parametrize(
    ("hosts", "asked", "says"),
    [
        ("a:4,b:8", None, "slots differ (a=4, b=8): give each host as many, or --ranks-per-node"),
        ("a:4,b", None, "slots differ (a=4, b=unsaid)"),
        ("a:4,b:8", 5, "--ranks-per-node is 5, but a has 4 slots"),
        ("a", 0, "--ranks-per-node is 0: it must be at least 1"),
    ],
)
def test_ranks_that_do_not_fit(hosts: str, asked: int | None, says: str) -> None:
    with pytest.raises(ValueError) as refused:
        ranks_per_node(from_list(hosts), asked)
    assert says in str(refused.value)
