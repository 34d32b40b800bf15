"""The runs of a study as arrays of SLURM jobs, one for each number of ranks that there is among them."""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coe_megatron.config.layout import layout
from coe_megatron.errors import ConfigError
from coe_megatron.files import as_argument
from coe_megatron.slurm import SCRIPTS
from coe_megatron.study.plan.arms import Run
from coe_megatron.study.run.paths import config_of


@dataclass(frozen=True)
class Submission:
    """One array.

    Attributes:
        command: sbatch's; the configs of the runs must be written before.
        environment: variables beside those of this process.
    """

    runs: list[Run]
    command: list[str]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """As a shell takes it."""
        settings = (f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        return f"{' '.join(settings)} {shlex.join(self.command)}"

    def submit(self, environment: Mapping[str, str]) -> str:
        """Hand it to SLURM; returns the job's number.

        Raises:
            ConfigError: sbatch is not there, or refuses; one line with its last word.
        """
        try:
            done = subprocess.run(
                self.command,
                env={**environment, **self.environment},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except FileNotFoundError:
            raise ConfigError(
                "sbatch is not installed here: submit where SLURM's tools are, or see --dry-run"
            ) from None
        except OSError as error:  # such as more configs than a command line holds
            said = f"{(error.strerror or str(error)).lower()}, with {len(self.runs):,} runs"
            raise ConfigError(f"sbatch cannot be started: {said}; --only and --seed take fewer") from None
        if done.returncode:
            words = done.stderr.strip().splitlines() or ["no word"]
            raise ConfigError(f"sbatch ended with status {done.returncode}: {words[-1]}")
        return done.stdout.strip().partition(";")[0]


def submissions(
    runs: Sequence[Run], ranks_per_node: int | None, at_once: int | None, options: Sequence[str]
) -> list[Submission]:
    """The arrays for some runs.

    Args:
        ranks_per_node: of a run; all of its ranks on one node when None.
        at_once: so many tasks of an array at a time; as many as SLURM has room for when None.
        options: of sbatch, which win over ours.

    Raises:
        ConfigError: the ranks of a run do not fill nodes.
    """
    if options and not options[0].startswith("-"):  # sbatch would take it for the script
        raise ConfigError(f"--sbatch begins with {options[0]}: it must hold options, such as --time=1:00:00")
    by_ranks: dict[int, list[Run]] = {}
    for run in runs:
        by_ranks.setdefault(layout(run.config).world_size, []).append(run)
    return [_submission(group, ranks, ranks_per_node or ranks, at_once, options) for ranks, group in by_ranks.items()]


def _submission(
    runs: list[Run], ranks: int, ranks_per_node: int, at_once: int | None, options: Sequence[str]
) -> Submission:
    own = min(ranks, ranks_per_node)
    if ranks % own:
        raise ConfigError(
            f"--ranks-per-node is {ranks_per_node}: {runs[0].arm} has {ranks} ranks, which it must divide"
        )
    array = f"--array=0-{len(runs) - 1}{f'%{at_once}' if at_once else ''}"
    own_names = ("--job-name=coe-study", "--output=slurm-%A_%a.log")
    configs = [as_argument(config_of(run)) for run in runs]
    script = str(SCRIPTS / "pretrain.sbatch")
    command = ["sbatch", "--parsable", array, f"--nodes={ranks // own}", *own_names, *options, script, *configs]
    return Submission(runs, command, {**_home(), "COE_STUDY": "1", "COE_RANKS_PER_NODE": str(own)})


def _home() -> dict[str, str]:
    """Where the job finds this project: in a checkout, else where the Python that runs this has it installed."""
    root = SCRIPTS.parents[2]
    return {"COE_HOME": str(root)} if (root / "launch/pretrain_coe.py").is_file() else {"COE_PYTHON": sys.executable}
