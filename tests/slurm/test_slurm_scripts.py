"""The scripts of launch/slurm/ without a run: shellcheck, sbatch's own check, and mistakes in how they are called."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT
from slurm_place import Place

pytestmark = pytest.mark.thorough

SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.s*"))


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_there_are_scripts_to_check() -> None:
    assert {path.name for path in SCRIPTS} == {"chain.sh", "pretrain.sbatch", "site.example.sh"}


NUMBERS = ["0", "two", "-1", "01", "1001", "1" * 20, "9" * 5000, "1 ", "a[$(touch x)]"]
# sbatch that takes two jobs of a chain.
SBATCH = """#!/bin/sh
echo "$@" >>taken
test $(wc -l <taken) -le 2 && exec wc -l <taken
echo 'sbatch: error: no' >&2
exit 7
"""


def test_a_chain_explains_itself() -> None:
    done = subprocess.run(
        ["bash", ROOT / "launch/slurm/chain.sh", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: chain.sh NUMBER ") and "NUMBER is from 1 to 1000" in done.stdout


def test_a_chain_that_sbatch_cuts_short_says_which_jobs_stand(tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "launch" / "slurm" / "chain.sh", "5", "c.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (7, ["1", "2"])
    assert "chain.sh: error: sbatch accepted 2 of 5 jobs: 1 2; to cancel them: scancel 1 2\n" in done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["2"], ["2", "--nodes=2", "--"], *([number, "c.yaml"] for number in NUMBERS)]
)
def test_a_chain_without_number_or_config_is_one_line(arguments: list[str]) -> None:
    script = ROOT / "launch" / "slurm" / "chain.sh"
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("chain.sh: error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"COE_HOME": "/nowhere"}, "COE_HOME is /nowhere: it must be this project's folder"),
        ({"SLURM_JOB_NODELIST": ""}, "this is for sbatch"),
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set, though SLURM_JOB_NODELIST is"),
        ({}, "a config is needed"),
    ],
)
def test_a_mistake_before_the_start_is_one_line(environment: dict[str, str], said: str, tmp_path: Path) -> None:
    """As SLURM starts it: a copy in another folder."""
    script = shutil.copy(ROOT / "launch" / "slurm" / "pretrain.sbatch", tmp_path / "slurm_script")
    (tmp_path / "squeue").symlink_to("/bin/true")
    path = f"{tmp_path}:{os.environ['PATH']}"
    given = {"PATH": path, "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "7", "COE_HOME": str(ROOT), **environment}
    done = subprocess.run(["bash", script], env=given, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"pretrain.sbatch: error: {said}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLURMD_NODENAME": ""}, "SLURMD_NODENAME is not set, though SLURM_JOB_NODELIST is"),
        ({"COE_RANKS_PER_NODE": "1" + "0" * 30}, "COE_RANKS_PER_NODE is 1000"),
        ({"COE_RANKS_PER_NODE": "08"}, "COE_RANKS_PER_NODE is 08: it must be a number from 1"),
        ({"COE_CHECK_NODES": "maybe"}, "COE_CHECK_NODES is maybe: it must be 0 or 1"),
        ({"COE_SPARE_NODES": "x[0$(touch x)]"}, "COE_SPARE_NODES is x[0"),
        ({"COE_SPARE_NODES": "1"}, "COE_SPARE_NODES is 1: it must be less than the number of nodes, 1"),
        ({"SCONTROL": "false"}, "SLURM_JOB_NODELIST is n1: scontrol knows no such nodes"),
    ],
)
def test_a_job_with_variables_in_part_is_one_line(environment: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "squeue").symlink_to("/bin/true")
    (tmp_path / "scontrol").write_text("#!/bin/sh\n${SCONTROL:-echo n1}\n")
    (tmp_path / "scontrol").chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COE_HOME": str(ROOT), "COE_PYTHON": sys.executable}
    given |= {
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_ID": "7",
        "SLURMD_NODENAME": "n1",
        "SLURM_CPUS_ON_NODE": "1",
        **environment,
    }
    command = ["bash", ROOT / "launch" / "slurm" / "pretrain.sbatch", "c.yaml"]
    done = subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, (tmp_path / "x").exists()) == (2, "", False)
    assert done.stderr.startswith(f"pretrain.sbatch: error: {said}") and done.stderr.count("\n") == 1


def test_a_step_without_its_job_is_one_line() -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "COE_ATTEMPT": "/nowhere"}
    command = [sys.executable, "-m", "coe_megatron.cli.slurm_task", "c.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = "slurm_task: error: COE_LAUNCH is not set: pretrain.sbatch and srun set it\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize(
    ("task", "said"),
    [(None, "COE_STUDY is for array jobs"), ("2", "task 2 of the array has no config: there are 2")],
)
def test_a_task_without_a_config_is_one_line(task: str | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "squeue").symlink_to("/bin/true")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "7"}
    environment |= {"COE_STUDY": "1"} if task is None else {"COE_STUDY": "1", "SLURM_ARRAY_TASK_ID": task}
    command = ["bash", ROOT / "launch" / "slurm" / "pretrain.sbatch", "a.yaml", "b.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"pretrain.sbatch: error: {said}") and done.stderr.count("\n") == 1


@pytest.mark.slurm
@pytest.mark.parametrize("options", [["--nodes=2"], ["--array=0-2%1"]])
def test_sbatch_takes_the_script_as_it_stands(options: list[str], place: Place) -> None:
    script = ROOT / "launch" / "slurm" / "pretrain.sbatch"
    done = place.cluster.run("sbatch", "--test-only", *options, "--time=60", script, "config.yaml", cwd=ROOT)
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
