"""The scripts of launch/slurm/ without a run: shellcheck, sbatch's own check, and mistakes in how they are called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from programs import ROOT
from slurm_place import Place

SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.s*"))


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_there_are_scripts_to_check() -> None:
    assert {path.name for path in SCRIPTS} == {
        "chain.sh",
        "pretrain.sbatch",
        "site.example.sh",
        "step.sh",
        "study.sbatch",
    }


@pytest.mark.parametrize("arguments", [[], ["0", "c.yaml"], ["two", "c.yaml"], ["2"], ["2", "--nodes=2", "--"]])
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
    ("task", "said"),
    [(None, "this is for an array of jobs"), ("2", "task 2 of the array has no config: there are 2")],
)
def test_a_task_without_a_config_is_one_line(task: str | None, said: str) -> None:
    environment = {"PATH": os.environ["PATH"], **({} if task is None else {"SLURM_ARRAY_TASK_ID": task})}
    command = ["bash", ROOT / "launch" / "slurm" / "study.sbatch", "a.yaml", "b.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"study.sbatch: error: {said}") and done.stderr.count("\n") == 1


@pytest.mark.slurm
@pytest.mark.parametrize(("name", "options"), [("pretrain.sbatch", ["--nodes=2"]), ("study.sbatch", ["--array=0-2%1"])])
def test_sbatch_takes_the_scripts_as_they_stand(name: str, options: list[str], place: Place) -> None:
    script = ROOT / "launch" / "slurm" / name
    done = place.cluster.run("sbatch", "--test-only", *options, "--time=60", script, "config.yaml", cwd=ROOT)
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
