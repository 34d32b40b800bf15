"""What launchers set in the environment: whole, in part, contradicting itself, nonsense; a mistake is one line."""

import re
from pathlib import Path

import pytest
from programs import python

from coe_megatron.distributed.environment import DistributedEnv, rank_of, whole_number
from coe_megatron.errors import ConfigError

PAIR = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
TORCHRUN = {
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"},
    **{"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "1", "OMP_NUM_THREADS": "4,2"},
    **{"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"},
}


def test_an_empty_environment_is_a_single_process() -> None:
    for environment in ({}, {"LOCAL_RANK": "0", "MASTER_ADDR": "n1"}, {"CUDA_VISIBLE_DEVICES": ""}):
        assert DistributedEnv.from_environment(environment) == DistributedEnv()
    assert DistributedEnv.from_environment({"RANK": "0", "WORLD_SIZE": "1"}) == DistributedEnv()


def test_what_torchrun_sets_is_read() -> None:
    logs = "/logs/ranks/node-0/1"
    found = DistributedEnv.from_environment({**TORCHRUN, "TORCHELASTIC_ERROR_FILE": f"{logs}/error.json"})
    assert (found.rank, found.world_size, found.local_rank, found.node_rank) == (5, 8, 1, 1)
    assert (found.master_addr, found.master_port, found.agent_store, found.single_node, found.launched) == (
        "n1",
        1,
        True,
        False,
        True,
    )
    assert (found.log_dir, found.store_prefix, found.rendezvous_timeout) == (Path(logs), "", 600)
    one_node = {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "5"}
    found = DistributedEnv.from_environment({**TORCHRUN, **one_node, "TORCHELASTIC_RESTART_COUNT": "3"})
    assert (found.store_prefix, found.single_node) == ("start 3", True)


def test_variables_set_by_hand_have_a_shorter_default_timeout() -> None:
    found = DistributedEnv.from_environment(PAIR)
    assert (found.master_addr, found.master_port, found.rendezvous_timeout, found.launched) == (
        "localhost",
        29500,
        60,
        False,
    )
    assert found.single_node  # whoever can connect there is on this host
    assert DistributedEnv.from_environment({**PAIR, "COE_RENDEZVOUS_TIMEOUT": "7"}).rendezvous_timeout == 7
    assert not DistributedEnv.from_environment({**PAIR, "MASTER_ADDR": "localhost.example.org"}).single_node


NUMBERS = [
    "",
    "abc",
    "-1",
    "+1",
    "1.0",
    " 1",
    "1 ",
    "0x1",
    "1e3",
    "1_0",
    "\uff11",
    "\u0661",
    "9" * 30,
    "9" * 5000,
    "1\n",
]
COUNTED = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_PORT"]


@pytest.mark.parametrize("name", [*COUNTED, "TORCHELASTIC_RESTART_COUNT", "COE_RENDEZVOUS_TIMEOUT", "OMP_NUM_THREADS"])
@pytest.mark.parametrize("value", NUMBERS)
def test_what_is_no_number_is_named(name: str, value: str) -> None:
    for environment in (TORCHRUN, {}):
        with pytest.raises(ConfigError, match=rf"^{name} is .*: it must be a (whole )?number ") as raised:
            DistributedEnv.from_environment({**environment, name: value})
        assert str(raised.value).isprintable() and len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"RANK": None}, "WORLD_SIZE is 8, but RANK is not set"),
        ({"WORLD_SIZE": None}, "RANK is 5, but WORLD_SIZE is not set"),
        ({"RANK": None, "WORLD_SIZE": None}, "LOCAL_RANK is 1, but RANK is not set"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set, but WORLD_SIZE is 8"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set, but WORLD_SIZE is 8"),
        ({"RANK": "8"}, "RANK is 8: it must be below WORLD_SIZE, which is 8"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0': it must be a whole number from 1"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK is 4: it must be below LOCAL_WORLD_SIZE, which is 4"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is 3: it must divide WORLD_SIZE, which is 8"),
        ({"LOCAL_WORLD_SIZE": "16"}, "LOCAL_WORLD_SIZE is 16: it must divide WORLD_SIZE, which is 8"),
        ({"GROUP_RANK": "2"}, "GROUP_RANK is 2: it must be below GROUP_WORLD_SIZE, which is 2"),
        ({"GROUP_WORLD_SIZE": "4"}, "GROUP_WORLD_SIZE is 4: it must be WORLD_SIZE / LOCAL_WORLD_SIZE, which is 2"),
        ({"GROUP_WORLD_SIZE": None, "GROUP_RANK": "2"}, "GROUP_RANK is 2: it must be below the number of nodes, 2"),
        ({"RANK": "0"}, "LOCAL_RANK is 1: it must be at most RANK, which is 0"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0': it must be a whole number from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536': it must be a whole number from 1 to 65535"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is '': it must be the name or the address"),
        ({"MASTER_ADDR": "a b"}, "MASTER_ADDR is 'a b': it must be the name or the address"),
        ({"MASTER_ADDR": "n" * 300}, "MASTER_ADDR is 'nnn"),
        ({"TORCHELASTIC_USE_AGENT_STORE": "1"}, "TORCHELASTIC_USE_AGENT_STORE is '1': it must be True or False"),
        ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS is '0': it must be a number of threads"),
        ({"OMP_NUM_THREADS": "4,"}, "OMP_NUM_THREADS is '4,': it must be a number of threads"),
        ({"MKL_NUM_THREADS": "many"}, "MKL_NUM_THREADS is 'many': it must be a number of threads"),
        ({"CUDA_VISIBLE_DEVICES": "all"}, "CUDA_VISIBLE_DEVICES is 'all': it must list devices"),
        ({"CUDA_VISIBLE_DEVICES": "0,,1"}, "CUDA_VISIBLE_DEVICES is '0,,1': it must list devices"),
        ({"CUDA_VISIBLE_DEVICES": "0,0"}, "CUDA_VISIBLE_DEVICES is '0,0': it must list devices"),
    ],
)
def test_a_contradiction_names_the_variable(changed: dict[str, str | None], says: str) -> None:
    environment = {name: value for name, value in {**TORCHRUN, **changed}.items() if value is not None}
    with pytest.raises(ConfigError, match=re.escape(says)):
        DistributedEnv.from_environment(environment)


@pytest.mark.parametrize(
    "devices", ["0", "0,1", "0, 1", "-1", "GPU-8932f937-d72c-4106", "MIG-GPU-89/1/2", "NoDevFiles"]
)
def test_devices_as_cuda_and_schedulers_name_them(devices: str) -> None:
    assert DistributedEnv.from_environment({"CUDA_VISIBLE_DEVICES": devices}) == DistributedEnv()


def test_the_rank_that_may_speak() -> None:
    assert rank_of(PAIR) == 1
    for environment in ({}, {"RANK": "1"}, {"RANK": "abc", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}):
        assert rank_of(environment) == 0
    assert whole_number("x", "007", 0, 7) == 7


def test_torch_is_not_imported() -> None:
    modules = "coe_megatron.distributed.environment, coe_megatron.scratch, coe_megatron.cli.checkpoint"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert python("-c", code).returncode == 0


def test_a_file_for_errors_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    alone = {"RANK": "0", "WORLD_SIZE": "1"}
    with pytest.raises(ConfigError, match=r"^TORCHELASTIC_ERROR_FILE is '.*: it must be the path of a file"):
        DistributedEnv.from_environment({**alone, "TORCHELASTIC_ERROR_FILE": str(tmp_path / "loop" / "error.json")})
    found = DistributedEnv.from_environment({**alone, "TORCHELASTIC_ERROR_FILE": "/error.json"})
    assert found.log_dir == Path("/")
