"""Plans, runs and reports studies: one file defines the arms to compare, and each arm is run with several seeds."""

import argparse
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from coe_megatron.cli.arguments import Parser, program_name, write_out
from coe_megatron.config.layout import layout
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.estimate.machine import machines
from coe_megatron.files import problem, require_replaceable, user_path, write_atomically
from coe_megatron.launcher.torchrun_supervisor import Requests
from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.run.status import table
from coe_megatron.study.plan.arms import Run, largest_arms
from coe_megatron.study.plan.cost_table import Plan, make_plan
from coe_megatron.study.plan.names import listed
from coe_megatron.study.plan.tuning import TuningCurve
from coe_megatron.study.run.paths import check_places, config_of, write_config
from coe_megatron.study.run.runner import (
    Runner,
    RunResult,
    has_trunk,
    is_finished,
    run_status,
    seed_by_seed,
    usable_devices,
)
from coe_megatron.study.run.slurm_arrays import submissions

EPILOG = """examples:
  %(prog)s plan configs/studies/paper/main-pair.yaml
  %(prog)s plan configs/studies/cpu/main-pair.yaml --calibration runs/cpu/moe_8-64
  %(prog)s plan configs/studies/paper/width.yaml --machine h100 --price 2.50 training.steps=500
  %(prog)s run configs/studies/cpu/main-pair.yaml --at-once 2
  %(prog)s run configs/studies/cpu/main-pair.yaml --only coe-2-4-64_prenorm --seed 2
  %(prog)s submit configs/studies/paper/main-pair.yaml --sbatch='--gpus-per-node=1 --time=1:00:00'
  %(prog)s status configs/studies/cpu/main-pair.yaml
  %(prog)s register configs/studies/cpu/ladder.yaml
  %(prog)s report configs/studies/cpu/main-pair.yaml
  %(prog)s verdict configs/studies/claims.yaml --to docs/claims.md

exit status: 0 done, 1 a run failed, 2 invalid arguments or study file (one line on stderr), 3 stopped on request, 130
ended at once by a second signal."""
PLAN = "Print the estimated cost of a study before anything runs: one row per arm. Needs no data."
RUN = """Run all unfinished runs on this machine: one after another, or in parallel on several devices. If the study
tunes a setting, the tuning runs come first, and each arm then runs with the value that was best for it. Interrupted
runs resume; a failed run does not stop the others. On Ctrl-C the current runs save a checkpoint, and the same command
resumes. The log and the complete config of a run are next to its folder; to repeat a single run:
torchrun ... -m coe_megatron.cli.pretrain CONFIG."""
REPORT = """Write a report on the finished runs: report.html (one file), report.md, the figures as SVG and PNG,
results.csv (one row per run) and timings.csv."""
SUBMIT = """Submit all unfinished runs to SLURM: an array job with one task per run (launch/slurm/pretrain.sbatch). Each
run resumes automatically after time limits and preemption. If the study tunes a setting, submit it twice: first the
tuning runs, and once these are done, the arms with the values that were best for them."""
VERDICT = """Judge claims by the reports of studies: each holds, does not hold, or is undecided. The CSV files of the
reports are enough; the folders of runs are not needed."""
REGISTER = """Predict the largest width of a ladder from the finished runs of the others, before it runs, and write the
prediction with its interval, every setting and digests of the data to OUTPUT/registration.json. `report` then refuses a
study that has changed since."""
STATUS = "Show the status of the study's runs: one line per run."


def make_parser() -> Parser:
    parser = Parser(prog=program_name("coe-study", "study.py"), description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="plan|run|submit|status|register|report|verdict"
    )
    texts = {"plan": PLAN, "run": RUN, "submit": SUBMIT, "status": STATUS, "register": REGISTER, "report": REPORT}
    parsers = {name: commands.add_parser(name, help=_summary(text), description=text) for name, text in texts.items()}
    for command in parsers.values():
        command.add_argument(
            "study", type=user_path, metavar="STUDY.yaml", help="a file, or a packaged one: studies/cpu/main-pair.yaml"
        )
        command.add_argument("overrides", nargs="*", default=[], help="key.sub=value, for all arms")
        machine = (
            f"for the predicted hours: a machine file, or {', '.join(machines())} (default: the study's `machine`)"
        )
        command.add_argument("--machine", metavar="NAME", help=machine)
        speed = "the folder of a finished run on such a machine, whose measured speed the predicted hours are based on"
        command.add_argument("--calibration", type=user_path, metavar="RUN", help=speed)
    plan, run, submit, status, report = (parsers[name] for name in ("plan", "run", "submit", "status", "report"))
    memory = "memory of a device, which all arms must fit, such as 80GiB (default: the machine's)"
    plan.add_argument("--device-memory", metavar="SIZE", help=memory)
    plan.add_argument(
        "--price",
        type=price,
        metavar="PRICE",
        help="price of one device-hour, for the total cost (default: the machine's)",
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object, unrounded")
    for command in (run, submit):
        command.add_argument("--only", metavar="ARM", help="only this arm")
        command.add_argument("--seed", type=int, metavar="SEED", help="only this seed")
        at_once = "largest number of runs at the same time (default: one per GPU, one without GPUs; submit: no limit)"
        command.add_argument("--at-once", type=whole_number, metavar="N", help=at_once)
    smaller = "only the widths of a ladder that the law is fitted to, so that the largest can be registered"
    for command in (run, submit):
        command.add_argument("--before-largest", action="store_true", help=smaller)
    run.add_argument("--devices", metavar="0,1", help="the GPUs to use (default: CUDA_VISIBLE_DEVICES, else all)")
    shared = "runs that share a GPU at a time: small models do not fill one (default: 1)"
    run.add_argument("--per-device", type=whole_number, default=1, metavar="N", help=shared)
    status.add_argument("--json", action="store_true", help="print JSON for programs: unrounded, null means unknown")
    per_node = "ranks of a run on each node (default: all on one node)"
    submit.add_argument("--ranks-per-node", type=whole_number, metavar="N", help=per_node)
    sbatch = "more options of sbatch, such as --sbatch='--account=mine --gpus-per-node=1 --time=1:00:00'"
    submit.add_argument("--sbatch", type=shlex.split, default=[], metavar="OPTIONS", help=sbatch)
    submit.add_argument("--dry-run", action="store_true", help="print the commands, and submit nothing")
    where = "folder of the report (default: `report` in the study's output)"
    report.add_argument("--to", type=user_path, metavar="FOLDER", help=where)
    report.add_argument("--title", help="title of the report (default: the study file's name)")
    verdict = commands.add_parser("verdict", help=_summary(VERDICT), description=VERDICT)
    verdict.add_argument("claims", type=user_path, metavar="CLAIMS.yaml", help="a file, or a packaged one")
    verdict.add_argument("--to", type=user_path, metavar="FILE.md", help="write the page to a file (default: stdout)")
    verdict.add_argument("--json", action="store_true", help="print JSON for programs, unrounded")
    return parser


def _summary(description: str) -> str:
    return re.split(r"[.:,]", description)[0]


def price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number of at least 0")
    return value


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def planned(options: argparse.Namespace) -> Plan:
    """The study's plan; it depends on what tuning runs have left in their folders."""
    limits = (options.device_memory, options.price) if options.command == "plan" else (None, None)
    return make_plan(options.study, options.overrides, options.machine, options.calibration, *limits)


def run(plan: Plan, options: argparse.Namespace) -> ExitStatus:
    devices = usable_devices(options.devices, os.environ)
    requests = Requests()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: requests.more())

    def go(runs: list[Run]) -> list[RunResult]:
        at_once = options.at_once or max(1, len(devices) * options.per_device)
        return Runner(devices, at_once, say, options.per_device).run(runs, requests)

    ended, open_runs = list[RunResult](), 0
    if tuning := _open_tuning(plan, options):
        ended, open_runs = go(tuning), len(tuning)
        plan = planned(options)
    if not requests.stop.is_set():
        for curve in _curves(plan, options):
            say(curve.outcome)
        comparison = _open_runs(plan, options)
        ended, open_runs = [*ended, *go(comparison)], open_runs + len(comparison)
    if not open_runs:
        return ExitStatus.FAILED if _not_chosen(plan, options) else ExitStatus.DONE
    status = _conclude(ended, open_runs, requests)
    return ExitStatus.FAILED if status is ExitStatus.DONE and _not_chosen(plan, options) else status


def submit(plan: Plan, options: argparse.Namespace) -> ExitStatus:
    open_runs = [*_open_tuning(plan, options), *_open_runs(plan, options)]
    ready = [each for each in open_runs if has_trunk(each)]
    for array in submissions(ready, options.ranks_per_node, options.at_once, options.sbatch):
        if options.dry_run:
            write_out(str(array))
            continue
        _write_configs(array.runs)
        ranks = layout(array.runs[0].config).world_size
        say(f"job {array.submit(os.environ)}: {len(array.runs)} runs of {ranks} ranks")
    if waiting := _not_chosen(plan, options):
        say(f"{listed(waiting)}: submit again when the tuning runs are done")
    if later := len(open_runs) - len(ready):
        say(f"{later} runs are branches: submit again when the runs that they branch off are done")
    return ExitStatus.DONE


def _write_configs(runs: list[Run]) -> None:
    for each in runs:
        try:
            write_config(each)
        except OSError as error:
            raise problem(config_of(each), "the run's config", error) from None


def _curves(plan: Plan, options: argparse.Namespace) -> list[TuningCurve]:
    return [curve for curve in plan.tuning if options.only in (None, curve.arm)]


def _not_chosen(plan: Plan, options: argparse.Namespace) -> list[str]:
    """The selected arms that wait for their tuning."""
    return [curve.arm for curve in _curves(plan, options) if curve.chosen_index is None]


def _open_tuning(plan: Plan, options: argparse.Namespace) -> list[Run]:
    """The selected tuning runs that have no loss yet; prints how many there are."""
    _check_selection(plan, options)
    seeds = plan.study.settings.tune.seeds if plan.study.settings.tune else []
    only_seed = options.seed if options.seed in seeds else None  # another seed needs the choice, so all tuning runs
    missing = [each for curve in _curves(plan, options) for each in curve.missing if only_seed in (None, each.seed)]
    found = [each for each in seed_by_seed(missing) if not is_finished(each)]
    if found:
        say(f"{len(found)} tuning runs are unfinished")
    return found


def _open_runs(plan: Plan, options: argparse.Namespace) -> list[Run]:
    """The unfinished runs of the comparison among those selected by the options; prints how many there are."""
    _check_selection(plan, options)
    skipped = largest_arms(plan.study) if options.before_largest else set()
    selected = [
        each
        for each in plan.ready_runs
        if options.only in (None, each.arm) and options.seed in (None, each.seed) and each.arm not in skipped
    ]
    open_runs = [each for each in seed_by_seed(selected) if not is_finished(each)]
    total = len(selected)
    if total or not plan.tuning:
        say(f"{len(open_runs)} of {total} runs are unfinished" if open_runs else f"all {total} runs are done")
    return open_runs


def _check_selection(plan: Plan, options: argparse.Namespace) -> None:
    """Check `--only` and `--seed`."""
    settings = plan.study.settings
    arms, seeds = (
        [arm.name for arm in plan.study.arms],
        [*settings.seeds, *(settings.tune.seeds if settings.tune else [])],
    )
    if options.only is not None and options.only not in arms:
        raise ConfigError(f"--only is {options.only}: it must be an arm, one of {listed(arms)}")
    if options.before_largest and settings.ladder is None:
        raise ConfigError("--before-largest: the study has no ladder")
    if options.seed is not None and options.seed not in seeds:
        raise ConfigError(f"--seed is {options.seed}: it must be one of {listed(map(str, seeds))}")


def _conclude(ended: list[RunResult], runs: int, requests: Requests) -> ExitStatus:
    done = [each for each in ended if _is_done(each)]
    if requests.stop.is_set() and len(done) < runs:
        say(f"stopped with {len(done)} of {runs} runs done; the same command resumes")
        return ExitStatus.INTERRUPTED if requests.end.is_set() else ExitStatus.STOPPED
    failed = [each for each in ended if not _is_done(each)]
    say(f"{len(done)} of {runs} runs are done" + (f", {len(failed)} are not:" if failed else ""))
    for each in failed:
        say(f"  {each.run.title}: {each.status.name}: {each.reason}")
    return ExitStatus.FAILED if failed else ExitStatus.DONE


def _is_done(ended: RunResult) -> bool:
    """Whether a run needs no other attempt; a tuning run that diverged has shown what it was run for."""
    return ended.status is ExitStatus.DONE or (bool(ended.run.tuned) and ended.status is ExitStatus.DIVERGED)


def show(plan: Plan, options: argparse.Namespace) -> ExitStatus:
    now = time.time()
    rows = [run_status(each, now) for each in (*plan.tuning_runs, *plan.study.runs)]
    write_out(json.dumps([row.as_dict() for row in rows], indent=2) if options.json else table(rows, now))
    return ExitStatus.DONE


def register(plan: Plan, _options: argparse.Namespace) -> ExitStatus:
    from coe_megatron.study.plan.registration import register as write_registration  # its fit needs scipy

    path, found = write_registration(plan.study)
    for arm, each in found.predictions.items():
        say(f"{arm}: {each.loss:.4f} nats per token, {each.interval[0]:.4f} to {each.interval[1]:.4f}")
    for warning in found.warnings:
        say(f"warning: {warning}")
    say(f"{path}: SHA-256 {found.sha256}")
    return ExitStatus.DONE


def report(plan: Plan, options: argparse.Namespace) -> ExitStatus:
    from coe_megatron.study.report.report import write_report  # matplotlib takes a second

    folder = options.to or Path(plan.study.settings.output) / "report"
    title = options.title or f"Study {options.study.stem}"
    try:
        files = write_report(plan, title, folder)
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {folder}: {error.strerror}") from error
    write_out("\n".join(one_line(str(file)) for file in files))
    return ExitStatus.DONE


def judge(options: argparse.Namespace) -> ExitStatus:
    from coe_megatron.study.report import claims_page, verdict  # scipy takes a second
    from coe_megatron.study.report.claims_file import read_claims

    claims, to = read_claims(options.claims), options.to
    if to is not None:
        require_replaceable(to, "--to")
    verdicts = verdict.judge(claims.claims)
    if to is not None or not options.json:
        page = claims_page.as_markdown(claims.title, options.claims.name, verdicts, to.parent if to else Path())
        if to is None:
            write_out(page.rstrip("\n"))
        else:
            _write_page(to, page)
    if options.json:
        write_out(json.dumps([claims_page.as_dict(each) for each in verdicts], indent=2))
    return ExitStatus.DONE


def _write_page(path: Path, page: str) -> None:
    try:
        write_atomically(path, page)
    except OSError as error:
        raise problem(path, "--to", error) from None


def say(text: str) -> None:
    with suppress(SystemExit):  # the runs continue even if stdout is closed
        write_out(f"{time.strftime('%H:%M:%S')}  {text}")


def _verdict(parser: Parser, options: argparse.Namespace, late: list[str]) -> int:
    if late:
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    try:
        return judge(options)
    except ConfigError as error:
        parser.error(str(error))


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options, late = parser.parse_known_args(arguments)  # late: overrides after options, which argparse does not accept
    if unknown := [text for text in late if text.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command == "verdict":
        return _verdict(parser, options, late)
    options.overrides = [*options.overrides, *late]
    try:
        plan = planned(options)
        check_places(plan.study, plan.tuning_runs, to_write=options.command in ("plan", "run", "submit"))
        if options.command != "plan":
            commands = {"run": run, "submit": submit, "status": show, "register": register, "report": report}
            return commands[options.command](plan, options)
    except ConfigError as error:
        parser.error(str(error))
    write_out(json.dumps(plan.as_dict(), indent=2) if options.json else plan.table())
    return ExitStatus.DONE


if __name__ == "__main__":
    sys.exit(main())
