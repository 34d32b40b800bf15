"""What a SLURM job starts where: options of srun, and the rendezvous port of its ranks."""

import socket

import pytest

from coe_megatron.slurm.job import JobPlan, rendezvous_port

NODES = ["n1", "n2", "n3"]
SLURM = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_ON_NODE": "64", "SLURM_GPUS_ON_NODE": "8"}


def plan(**variables: str) -> JobPlan:
    return JobPlan.from_environment(NODES, SLURM | variables)


def test_torchrun_is_one_task_a_node_with_all_its_processors() -> None:
    options = plan(COE_SPARE_NODES="1").start_options()
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpu-bind=none"} <= set(options)


def test_a_task_a_rank_has_its_share_of_the_processors_and_sees_all_gpus() -> None:
    options = plan(COE_LAUNCH="tasks").start_options()
    assert {"--nodes=3", "--ntasks=24", "--ntasks-per-node=8", "--cpus-per-task=8", "--gpu-bind=none"} <= set(options)
    assert "--cpus-per-task=1" in plan(COE_LAUNCH="tasks", SLURM_CPUS_ON_NODE="2").start_options()


def test_all_nodes_are_looked_at_the_spare_ones_too() -> None:
    assert "--ntasks=3" in plan(COE_SPARE_NODES="2").check_options()
    assert plan(COE_CHECK_NODES="0").check_options() == []


@pytest.mark.parametrize(("variables", "ranks"), [({}, 24), ({"COE_RANKS_PER_NODE": "2"}, 6)])
def test_there_is_a_rank_for_a_gpu(variables: dict[str, str], ranks: int) -> None:
    assert plan(**variables).ranks == ranks
    del (no_gpus := dict(SLURM))["SLURM_GPUS_ON_NODE"]
    assert JobPlan.from_environment(NODES, no_gpus).ranks == 3


def test_jobs_that_share_a_node_and_starts_of_a_job_have_other_ports() -> None:
    ports = [rendezvous_port(job, restarts) for job in range(700, 764) for restarts in (0, 1)]
    pairs = {port + more for port in ports for more in (0, 1)}
    assert len(pairs) == 2 * len(ports) and max(pairs) < 32_768, "Linux itself gives ports from 32768 on"


def test_a_port_in_use_is_passed_over() -> None:
    first = rendezvous_port(7, 0)
    with socket.socket() as other:
        other.bind(("", first + 1))
        other.listen()
        assert rendezvous_port(7, 0) not in (first, first + 1)
    assert rendezvous_port(7, 0) == first
