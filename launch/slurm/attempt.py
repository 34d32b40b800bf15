"""What launch/slurm/pretrain.sbatch asks: begin or end an attempt, and which nodes to take.

    attempt.py begin --logs FOLDER --job ID --ranks N -- CONFIG.yaml [key.sub=value ...]
    attempt.py nodes --report FILE --count N NODE...
    attempt.py end --logs FOLDER --attempt FOLDER --status STATUS

`begin` checks the config, so that a mistake in it is one line before anything starts, and prints the folder for what
the attempt leaves behind, and that of the run. `nodes` names the bad nodes of a report of launch/check_nodes.py and
prints N good ones; where there are fewer it prints the bad ones instead, with exit status 1, and without a report
nothing. `end` tells which rank failed first, if any, notes how the attempt ended, and prints `again` or `over`: whether
the job should go on; its exit status is that of the attempt. Exit statuses are those of pretrain_coe.py.
"""

import argparse
import os
import sys
from pathlib import Path

from coe_megatron.config import load
from coe_megatron.config.arguments import Parser
from coe_megatron.distributed.environment import MOST_RANKS, whole_number
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import problem, require_folder, require_writable, user_path
from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.slurm.failures import find_failures, outcome
from coe_megatron.slurm.requeue import Attempts, Refused
from coe_megatron.slurm.spare_nodes import bad_nodes, choose

_MOST_REQUEUES = 1_000_000


def parser() -> Parser:
    made = Parser(prog="attempt.py", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True, metavar="begin|nodes|end")
    begin, nodes, end = (commands.add_parser(name, description=None) for name in ("begin", "nodes", "end"))
    for command in (begin, end):
        command.add_argument(
            "--logs", type=user_path, required=True, help="the folder that all attempts at a run share"
        )
    begin.add_argument("--job", required=True, help="SLURM's number of the job")
    begin.add_argument("--ranks", required=True, help="how many there will be")
    begin.add_argument("config", type=user_path)
    begin.add_argument("overrides", nargs="*", default=[])
    nodes.add_argument("--report", type=user_path, required=True, help="written by launch/check_nodes.py, if at all")
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
    attempts = attempts_in(options.logs)
    try:
        config = load(options.config, options.overrides, whole_number("--ranks", options.ranks, 1, MOST_RANKS))
        print(attempts.begin(options.job, Path(config.output)))
        print(config.output)
    except Refused as refused:
        say(str(refused))
        return refused.status
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
        told = "\n".join(failure.told() for failure in dict.fromkeys(failures[:1] + telling))
        say(f"{status.name}: {told or 'no rank has said why'}")
        say(f"all ranks' logs lie in {options.attempt}")
    decision = attempts_in(options.logs).end(status)
    say(f"{'goes on' if decision.again else 'does not go on'}: {decision.reason}")
    print("again" if decision.again else "over")
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
