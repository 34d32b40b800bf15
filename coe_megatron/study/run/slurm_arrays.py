"""Submits the runs of a study as SLURM job arrays, one array per number of ranks."""

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
    """One job array.

    Attributes:
        command: the sbatch command; write the configs of the runs before it is run.
        environment: variables to set in addition to those of this process.
    """

    runs: list[Run]
    command: list[str]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """As a shell command."""
        settings = (f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        return f"{' '.join(settings)} {shlex.join(self.command)}"

    def submit(self, environment: Mapping[str, str]) -> str:
        """Submit it to SLURM; returns the job id.

        Raises:
            ConfigError: sbatch is not installed or fails; one line with the last line of its error.
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
            raise ConfigError("sbatch is not installed here: submit on a host with SLURM, or use --dry-run") from None
        except OSError as error:  # for example, the configs do not fit on a command line
            reason = f"{(error.strerror or str(error)).lower()}, with {len(self.runs):,} runs"
            raise ConfigError(f"sbatch cannot be started: {reason}; --only and --seed select fewer") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no error message"]
            raise ConfigError(f"sbatch ended with status {done.returncode}: {lines[-1]}")
        return done.stdout.strip().partition(";")[0]


def submissions(
    runs: Sequence[Run], ranks_per_node: int | None, at_once: int | None, options: Sequence[str]
) -> list[Submission]:
    """The arrays that run `runs`.

    Args:
        ranks_per_node: ranks of a run per node; None puts all of them on one node.
        at_once: maximum number of running tasks per array; None leaves it to SLURM.
        options: options of sbatch, which override ours.

    Raises:
        ConfigError: `ranks_per_node` does not divide the ranks of a run, or the first of `options` is not an option.
    """
    if options and not options[0].startswith("-"):  # sbatch would use it as the script
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
            f"--ranks-per-node is {ranks_per_node}: {runs[0].arm} has {ranks} ranks, which is not a multiple of it"
        )
    array = f"--array=0-{len(runs) - 1}{f'%{at_once}' if at_once else ''}"
    own_names = ("--job-name=coe-study", "--output=slurm-%A_%a.log")
    configs = [as_argument(config_of(run)) for run in runs]
    script = str(SCRIPTS / "pretrain.sbatch")
    command = ["sbatch", "--parsable", array, f"--nodes={ranks // own}", *own_names, *options, script, *configs]
    return Submission(runs, command, {**_home(), "COE_STUDY": "1", "COE_RANKS_PER_NODE": str(own)})


def _home() -> dict[str, str]:
    """Variables that tell the job where this project is: a checkout, or the Python in which it is installed."""
    root = SCRIPTS.parents[2]
    return {"COE_HOME": str(root)} if (root / "launch/pretrain_coe.py").is_file() else {"COE_PYTHON": sys.executable}
