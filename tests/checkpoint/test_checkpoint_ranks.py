"""All ranks write, and each what it alone writes; a thread may do it; what fails on one rank is said on all."""

import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engine_build import make_engine, take_steps
from ranks import run_ranks

from coe_megatron.checkpoint import save_load
from coe_megatron.checkpoint.background import Background
from coe_megatron.checkpoint.integrity import MANIFEST
from coe_megatron.checkpoint.names import name_of

pytestmark = pytest.mark.ranks
STEP = name_of(1)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "expert"), [(2, 1), (4, 2)])
def test_ranks_write_equal_parts_of_what_one_process_writes(
    ranks: int, expert: int, single_rank: None, tmp_path: Path
) -> None:
    """With EP 2 the experts of a rank are spread over its replicas. And what cannot be written is said on all ranks."""
    save_both_ways(tmp_path / "one")
    found = run_ranks(save_both_ways_and_fill_a_disk, ranks, tmp_path / "several", expert_model_parallel_size=expert)
    (alone,) = sizes(tmp_path / "one" / "foreground" / STEP)
    parts = sizes(tmp_path / "several" / "foreground" / STEP)
    assert len(parts) == ranks and max(parts) < 1.1 * min(parts)
    assert sum(parts) == pytest.approx(alone, rel=0.01)
    for folder in ("one", "several"):
        foreground, background = (contents(tmp_path / folder / way / STEP) for way in ("foreground", "background"))
        assert foreground.keys() == background.keys() and MANIFEST in foreground
        assert foreground == background, "the run went on while the second was written"
    for rank in found:
        assert len(rank["said"]) == 2
        for said in rank["said"]:
            refused = tmp_path / "several" / "full" / "step-00000002"
            assert said.startswith(f"checkpoint {refused} could not be saved: ") and "\n" not in said, said
        assert rank["left"] == {"step": 1}, "the one before is used"
        assert rank["after all"] == {"step": 3}


def save_both_ways_and_fill_a_disk(folder: Path) -> dict:
    save_both_ways(folder)
    return fill_a_disk(folder / "full")


def save_both_ways(folder: Path) -> None:
    """In the foreground, and in the background while training goes on."""
    engine, background = make_engine(), Background()
    take_steps(engine, 0, 1)
    save_load.save(folder / "foreground", 1, engine, {"step": 1}, keep=1)
    save_load.save(folder / "background", 1, engine, {"step": 1}, keep=1, background=background)
    take_steps(engine, 1, 2)
    background.wait()


def sizes(checkpoint: Path) -> list[int]:
    return [path.stat().st_size for path in sorted((checkpoint / "tensors").glob("*.distcp"))]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill_a_disk(folder: Path) -> dict:
    """Rank 1 cannot write more than 100 kB a file, as if its disk were full; then it has room again."""
    engine, background, said = make_engine(), Background(), []
    save_load.save(folder, 1, engine, {"step": 1}, keep=2)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    for way in (None, background):
        try:
            save_load.save(folder, 2, engine, {"step": 2}, keep=2, background=way)
            background.wait()
        except save_load.CheckpointNotSaved as error:
            said.append(str(error))
    left = save_load.load_latest(folder, engine)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    save_load.save(folder, 3, engine, {"step": 3}, keep=2, background=background)
    background.wait()
    torch.distributed.barrier()
    return {"said": said, "left": left, "after all": save_load.load_latest(folder, engine)}
