"""Subcommands of launch/slurm/pretrain.sbatch: begin an attempt, choose nodes, end an attempt.

    python -m coe_megatron.cli.slurm_job begin --logs FOLDER --nodes "A B ..." -- CONFIG.yaml [key.sub=value ...]
    python -m coe_megatron.cli.slurm_job nodes --report FILE --count N NODE...
    python -m coe_megatron.cli.slurm_job end --logs FOLDER --attempt FOLDER --status STATUS

`begin` checks the job's variables and the config before anything starts, and reports a mistake in one line. It prints
variables for the job as lines NAME=VALUE: the folders of the attempt and the run, the number of nodes and ranks,
options of srun, the port.

`nodes` reads the report of the node check. It names the bad nodes on stderr and prints N good ones. If there are fewer,
it prints the bad ones instead, with exit status 1; without a report it prints nothing.

`end` names the rank that failed first, records how the attempt ended, and prints `requeue` or `end`. It exits with the
status of the attempt. Exit statuses are those of pretrain_coe.py.
"""

import argparse
import os
import sys
from pathlib import Path

from coe_megatron.cli.arguments import Parser
from coe_megatron.config import RunConfig, load
from coe_megatron.distributed.environment import MOST_RANKS, whole_number
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import problem, require_folder, require_writable, user_path
from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.slurm.failures import find_failures, outcome
from coe_megatron.slurm.job import JobPlan, rendezvous_port
from coe_megatron.slurm.requeue import AttemptRefused, Attempts
from coe_megatron.slurm.spare_nodes import bad_nodes, choose

_MAX_REQUEUES = 1_000_000
_NUMBERS, _LARGEST = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), (1 << 32) - 1


def make_parser() -> Parser:
    parser = Parser(prog="pretrain.sbatch", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="begin|nodes|end")
    begin, nodes, end = (commands.add_parser(name, description=None) for name in ("begin", "nodes", "end"))
    for command in (begin, end):
        command.add_argument("--logs", type=user_path, required=True, help="the folder shared by all attempts of a run")
    begin.add_argument("--nodes", type=str.split, required=True, help="the names of the job's nodes")
    begin.add_argument("config", type=user_path)
    begin.add_argument("overrides", nargs="*", default=[])
    nodes.add_argument("--report", type=user_path, required=True, help="the report of the node check; may be missing")
    nodes.add_argument("--count", required=True, help="the number of nodes needed")
    nodes.add_argument("names", nargs="+", metavar="NODE")
    end.add_argument("--attempt", type=user_path, required=True, help="the folder that `begin` printed")
    end.add_argument("--status", type=int, required=True, help="the exit status of srun")
    return parser


def max_requeues() -> int:
    return whole_number("COE_MAX_REQUEUES", os.environ.get("COE_MAX_REQUEUES", "3"), 0, _MAX_REQUEUES)


def attempts_in(logs: Path) -> Attempts:
    require_writable(logs, "--logs", "folder")
    return Attempts(logs, max_requeues())


def begin(options: argparse.Namespace) -> ExitStatus:
    plan = JobPlan.from_environment(options.nodes, os.environ)
    job, restarts = (whole_number(name, os.environ.get(name, "0"), 0, _LARGEST) for name in _NUMBERS)
    attempts = attempts_in(options.logs)
    config = load(
        options.config, options.overrides, whole_number("the number of ranks", str(plan.ranks), 1, MOST_RANKS)
    )
    save_every = _save_every(config, plan)
    try:
        folder = attempts.begin(str(job), Path(config.output))
    except AttemptRefused as refused:
        say(str(refused))
        return refused.status
    variables = {
        "COE_ATTEMPT": folder,
        "COE_OUTPUT": config.output,
        **plan.variables(),
        "MASTER_PORT": rendezvous_port(job, restarts),
        "COE_SAVE_EVERY": save_every or "",
    }
    for name, value in variables.items():
        print(f"{name}={value}")
    return ExitStatus.DONE


def _save_every(config: RunConfig, plan: JobPlan) -> int | None:
    """The best number of steps between checkpoints on the machine that COE_MACHINE names; None if it names none."""
    name = os.environ.get("COE_MACHINE")
    if not name:
        return None
    from coe_megatron.cli.estimates import best_save_interval

    steps = best_save_interval(config, name, plan.ranks, plan.nodes - plan.needed)
    say(f"a checkpoint every {steps:,} steps, the best interval on {name}")
    return steps


def nodes(options: argparse.Namespace) -> ExitStatus:
    bad = bad_nodes(options.report)
    if bad is None:  # perhaps all nodes are good, but the output folder is not
        say(f"the node check wrote no report; its output is in {options.report.with_suffix('.log')}")
        return ExitStatus.FAILED
    for node, reason in bad.items():
        say(one_line(f"node {node} is bad: {reason}"))
    count = whole_number("--count", options.count, 1, MOST_RANKS)
    chosen = choose(options.names, bad, count)
    if len(chosen) < count:
        say(f"{len(options.names) - len(bad)} of {len(options.names)} nodes are good, but {count} are needed")
        print(*bad, sep="\n")
        return ExitStatus.FAILED
    if bad:
        say(f"{len(bad)} bad node{'s' * (len(bad) > 1)} excluded")
    print(*chosen, sep="\n")
    return ExitStatus.DONE


def end(options: argparse.Namespace) -> ExitStatus:
    failures = find_failures(require_folder(options.attempt, "--attempt"))
    status = outcome(failures, options.status)
    if status is not ExitStatus.DONE:
        causes = [failure for failure in failures if failure.status is status][:1]
        reports = "\n".join(failure.describe() for failure in dict.fromkeys(failures[:1] + causes))
        say(f"{status.name}: {reports or 'no rank reported a reason'}")
        say(f"the logs of all ranks are in {options.attempt}")
    decision = attempts_in(options.logs).end(status)
    say(f"{'requeue' if decision.requeue else 'no requeue'}: {decision.reason}")
    print("requeue" if decision.requeue else "end")
    return status


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()
    try:
        return {"begin": begin, "nodes": nodes, "end": end}[options.command](options)
    except ConfigError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(str(problem(error.filename or "the disk", "a file of --logs", error)))


if __name__ == "__main__":
    sys.exit(main())
