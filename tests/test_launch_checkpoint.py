"""launch/checkpoint.py: in a process without groups, what it prints, its exit status, and mistakes in one line."""

import json
from pathlib import Path

import pytest
from engine_build import make_engine
from programs import python

from coe_megatron.checkpoint import save_load
from coe_megatron.checkpoint.names import name_of

PROGRAM = "launch/checkpoint.py"
pytestmark = pytest.mark.run


@pytest.fixture
def run(single_rank: None, tmp_path: Path) -> Path:
    folder, engine = tmp_path / "run", make_engine(8, layers=1)
    for step in (1, 2):
        state = {"step": step, "tokens": 1000 * step, "tokenizer": "T"}
        save_load.save(folder / "checkpoints", step, engine, state, keep=2)
    return folder


@pytest.mark.slow
def test_a_run_is_inspected_verified_and_averaged(run: Path) -> None:
    shown, as_json = python(PROGRAM, "inspect", run), python(PROGRAM, "inspect", run, "--json")
    assert shown.returncode == as_json.returncode == 0, shown.stderr
    assert "2, after 2,000 tokens" in shown.stdout and "1 x 8 x 48 x 32" in shown.stdout
    contents = json.loads(as_json.stdout)
    assert contents["metadata"]["layout"]["world_size"] == 1
    assert contents["tensors"]["output_layer.weight"]["shape"] == [64, 32]

    first, second = (run / "checkpoints" / name_of(step) for step in (1, 2))
    done = python(PROGRAM, "verify", run)
    assert (done.returncode, done.stdout) == (0, f"{second}: complete\n{first}: complete\n"), done.stderr
    made = run.parent / "mean"
    done = python(PROGRAM, "average", run, made, "--last", 2)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert save_load.load_weights(made, make_engine(8, layers=1))[1]["step"] == 2

    path = first / "tensors" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    (second / "complete.json").unlink()
    second.rename(second.with_suffix(".tmp"))
    done = python(PROGRAM, "verify", run)
    assert done.returncode == 1
    unfinished, damaged = done.stdout.splitlines()
    assert unfinished == f"{second}.tmp: its save was not finished"
    assert damaged.startswith(f"{first}: tensors/__0_0.distcp has ")
    done = python(PROGRAM, "average", run, made, "--last", 2, "--overwrite")
    assert done.returncode == 2
    assert done.stderr == f"checkpoint.py: error: {run} holds 1 finished checkpoints, but 2 are requested\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "nowhere"), "checkpoint.py: error: DIR is nowhere: there is no such folder"),
        (("verify", "configs"), "checkpoint.py: error: configs holds no checkpoint: name one, or the folder of a run"),
        (("reshard", "configs", "x", "--files", 0), "checkpoint.py: error: --files is 0: it must be at least 1"),
        (("average", "configs", "x", "--last", 1), "checkpoint.py: error: --last is 1: it must be at least 2"),
        (("average", "configs"), "checkpoint.py average: error: the following arguments are required: OUT"),
        (
            ("mend", "configs"),
            "checkpoint.py: error: argument inspect|verify|reshard|average|upcycle|import|export: invalid choice: 'me",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments: tuple[object, ...], said: str) -> None:
    done = python(PROGRAM, *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith(said), done.stderr
