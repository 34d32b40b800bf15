"""What launch/slurm/pretrain.sbatch asks: begin or end an attempt, and which nodes to take.

    python -m coe_megatron.cli.slurm_job begin --logs FOLDER --nodes "A B ..." -- CONFIG.yaml [key.sub=value ...]
    python -m coe_megatron.cli.slurm_job nodes --report FILE --count N NODE...
    python -m coe_megatron.cli.slurm_job end --logs FOLDER --attempt FOLDER --status STATUS

`begin` checks the job's variables and the config, so that a mistake in them is one line before anything starts, and
prints variables for the job, a line NAME=VALUE each: the attempt's folder and that of the run, how many nodes and ranks
there are, options of srun, the port. `nodes` names the bad nodes of a report of the node check and prints N good ones;
where there are fewer it prints the bad ones instead, with exit status 1, and without a report nothing. `end` tells
which rank failed first, if any, notes how the attempt ended, and prints `again` or `over`: whether the job should go
on; its exit status is that of the attempt. Exit statuses are those of pretrain_coe.py.
"""

import argparse
import os
import sys
from pathlib import Path

from coe_megatron.cli.arguments import Parser
from coe_megatron.config import load
from coe_megatron.distributed.environment import MOST_RANKS, whole_number
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import problem, require_folder, require_writable, user_path
from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.slurm.failures import find_failures, outcome
from coe_megatron.slurm.job import JobPlan, meeting_port
from coe_megatron.slurm.requeue import AttemptRefused, Attempts
from coe_megatron.slurm.spare_nodes import bad_nodes, choose

_MOST_REQUEUES = 1_000_000
_NUMBERS, _LARGEST = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), (1 << 32) - 1


def parser() -> Parser:
    made = Parser(prog="pretrain.sbatch", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True, metavar="begin|nodes|end")
    begin, nodes, end = (commands.add_parser(name, description=None) for name in ("begin", "nodes", "end"))
    for command in (begin, end):
        command.add_argument(
            "--logs", type=user_path, required=True, help="the folder that all attempts at a run share"
        )
    begin.add_argument("--nodes", type=str.split, required=True, help="the names of the job's nodes")
    begin.add_argument("config", type=user_path)
    begin.add_argument("overrides", nargs="*", default=[])
    nodes.add_argument("--report", type=user_path, required=True, help="written by the node check, if at all")
    nodes.add_argument("--count", required=True, help="how many are needed")
    nodes.add_argument("names", nargs="+", metavar="NODE")
    end.add_argument("--attempt", type=user_path, required=True, help="the folder that begin has printed")
    end.add_argument("--status", type=int, required=True, help="the exit status of srun")
    return made


def requeues() -> int:
    return whole_number("COE_MAX_REQUEUES", os.environ.get("COE_MAX_REQUEUES", "3"), 0, _MOST_REQUEUES)


def attempts_in(logs: Path) -> Attempts:
    require_writable(logs, "--logs", "folder")
    return Attempts(logs, requeues())


def begin(options: argparse.Namespace) -> ExitStatus:
    plan = JobPlan.from_environment(options.nodes, os.environ)
    job, restarts = (whole_number(name, os.environ.get(name, "0"), 0, _LARGEST) for name in _NUMBERS)
    attempts = attempts_in(options.logs)
    config = load(
        options.config, options.overrides, whole_number("the number of ranks", str(plan.ranks), 1, MOST_RANKS)
    )
    try:
        folder = attempts.begin(str(job), Path(config.output))
    except AttemptRefused as refused:
        say(str(refused))
        return refused.status
    told = {
        "COE_ATTEMPT": folder,
        "COE_OUTPUT": config.output,
        "COE_LAUNCH": plan.launch,
        "COE_NODES": plan.needed,
        "COE_RANKS_PER_NODE": plan.ranks_per_node,
        "COE_CHECK_OPTIONS": " ".join(plan.check_options()),
        "COE_START_OPTIONS": " ".join(plan.start_options()),
        "MASTER_PORT": meeting_port(job, restarts),
    }
    for name, value in told.items():
        print(f"{name}={value}")
    return ExitStatus.DONE


def nodes(options: argparse.Namespace) -> ExitStatus:
    bad = bad_nodes(options.report)
    if bad is None:  # the nodes may all be good, and the output folder not
        say(f"the node check has written no report; its own words are in {options.report.with_suffix('.log')}")
        return ExitStatus.FAILED
    for node, reason in bad.items():
        say(one_line(f"node {node} is bad: {reason}"))
    count = whole_number("--count", options.count, 1, MOST_RANKS)
    chosen = choose(options.names, bad, count)
    if len(chosen) < count:
        say(f"{len(options.names) - len(bad)} of {len(options.names)} nodes are good, and {count} are needed")
        print(*bad, sep="\n")
        return ExitStatus.FAILED
    if bad:
        say(f"{len(bad)} bad node{'s' * (len(bad) > 1)} left out")
    print(*chosen, sep="\n")
    return ExitStatus.DONE


def end(options: argparse.Namespace) -> ExitStatus:
    failures = find_failures(require_folder(options.attempt, "--attempt"))
    status = outcome(failures, options.status)
    if status is not ExitStatus.DONE:
        telling = [failure for failure in failures if failure.status is status][:1]
        told = "\n".join(failure.describe() for failure in dict.fromkeys(failures[:1] + telling))
        say(f"{status.name}: {told or 'no rank has said why'}")
        say(f"all ranks' logs lie in {options.attempt}")
    decision = attempts_in(options.logs).end(status)
    say(f"{'goes on' if decision.requeue else 'does not go on'}: {decision.reason}")
    print("again" if decision.requeue else "over")
    return status


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    program = parser()
    options = program.parse_args()
    try:
        return {"begin": begin, "nodes": nodes, "end": end}[options.command](options)
    except ConfigError as error:
        program.error(str(error))
    except OSError as error:
        program.error(str(problem(error.filename or "the disk", "a file of --logs", error)))


if __name__ == "__main__":
    sys.exit(main())
