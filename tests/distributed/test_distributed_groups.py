"""Starting a rank, its seeds, and the groups DeepSpeed is shown."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from ranks import run_ranks

from coe_megatron.distributed import process_groups
from coe_megatron.distributed.process_groups import MegatronGroups

PROGRAM = """
import json, psutil, sys, torch
from coe_megatron.config.settings import ParallelSettings
from coe_megatron.distributed import process_groups as groups
from megatron.core import parallel_state

device = groups.start(ParallelSettings(expert=int(sys.argv[1])), seed=3)
rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
values = {"device": device.type, "ranks": ranks, "ep": parallel_state.get_expert_model_parallel_world_size()}
values["weights"] = torch.rand(1).item()
groups.seed_dropout(3)
values["dropout"] = torch.rand(1).item()
connections = psutil.Process().net_connections("tcp")
values["listens"] = sorted({one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN})
groups.stop()
json.dump(values | {"stopped": not torch.distributed.is_initialized()}, open(f"{sys.argv[2]}/{rank}", "w"))
"""


@pytest.mark.slow
@pytest.mark.ranks
def test_start_alone_and_under_torchrun(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (alone,) = start_and_stop([], program, 1, tmp_path / "alone")
    pair = start_and_stop(torchrun, program, 2, tmp_path / "pair")
    for values, ranks in ((alone, 1), (pair[0], 2), (pair[1], 2)):
        assert (values["ranks"], values["ep"], values["stopped"]) == (ranks, ranks, True)
        assert values["listens"] == ["127.0.0.1"]  # whatever address the host's name has
        assert values["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert alone["weights"] == pair[0]["weights"] == pair[1]["weights"]
    assert alone["dropout"] == pair[0]["dropout"] != pair[1]["dropout"]


def start_and_stop(launcher: list[str], program: Path, expert: int, folder: Path) -> list[dict]:
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(process_groups.__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", *launcher, str(program), str(expert), str(folder)]
    subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True)
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


@pytest.mark.ranks
def test_deepspeed_is_shown_megatrons_groups() -> None:
    """The model-parallel group spans pipeline stages too, so that all clip by the norm of the whole model."""
    for rank, values in enumerate(run_ranks(look_at_groups, 2, pipeline_model_parallel_size=2)):
        assert (values["model"], values["model rank"]) == (2, rank)
        assert (values["tensor"], values["pipeline"], values["data"]) == (1, 2, 1)
        assert values["data ranks"] == [rank]


def look_at_groups() -> dict:
    mpu = MegatronGroups()
    assert torch.distributed.get_world_size(mpu.get_model_parallel_group()) == mpu.get_model_parallel_world_size()
    assert torch.distributed.get_rank(mpu.get_data_parallel_group()) == mpu.get_data_parallel_rank()
    return {
        "model": mpu.get_model_parallel_world_size(),
        "model rank": mpu.get_model_parallel_rank(),
        "tensor": mpu.get_tensor_model_parallel_world_size(),
        "pipeline": mpu.get_pipeline_model_parallel_world_size(),
        "data": mpu.get_data_parallel_world_size(),
        "data ranks": mpu.get_data_parallel_group_ranks(),
    }


@pytest.mark.ranks
def test_deepspeed_reduces_over_parts_of_sequences_too() -> None:
    for rank, values in enumerate(run_ranks(look_at_groups, 4, tensor_model_parallel_size=2, context_parallel_size=2)):
        assert values["data ranks"] == [rank % 2, rank % 2 + 2]


@pytest.mark.ranks
def test_dropout_masks_differ_between_parts_of_a_sequence() -> None:
    first, second = run_ranks(draw, 2, context_parallel_size=2)
    assert first["outside"] != second["outside"] and first["inside"] != second["inside"]


@pytest.mark.ranks
def test_dropout_seeds_differ_between_data_ranks_and_not_between_tensor_ranks() -> None:
    seen = run_ranks(draw, 4, tensor_model_parallel_size=2)
    (a0, a1), (b0, b1) = seen[:2], seen[2:]  # data-parallel ranks a and b, tensor-parallel ranks 0 and 1
    assert a0["outside"] == a1["outside"] != b0["outside"] == b1["outside"]
    assert len({rank["inside"] for rank in seen}) == 4, "in tensor-parallel regions every rank has its own"


def draw() -> dict[str, float]:
    process_groups.seed_dropout(11)
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(1).item()
    return {"outside": torch.rand(1).item(), "inside": inside}
