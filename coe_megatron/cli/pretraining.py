"""Pretrains a Chain-of-Experts model.

    torchrun --nproc-per-node 2 launch/pretrain_coe.py CONFIG.yaml [key.sub=value ...]

Without a checkout, use the installed package: `torchrun ... -m coe_megatron.cli.pretrain`, or `coe-pretrain` for one
rank. If CONFIG.yaml does not exist, the packaged config of that name is used: quickstart.yaml, gsm8k.yaml,
paper/coe-2_4-64.yaml and the others in configs/ of the repository.

The same command resumes from the most recent checkpoint. Exit status: 0 done; 1 unexpected error; 2 invalid config or
data (one line on stderr); 3 stopped on request (SIGTERM, SIGUSR1, the stop file), checkpoint saved; 4 the loss
diverged; 5 a checkpoint could not be written; 6 another run is using the output folder; 7 the run hung; 8 the output
folder was removed or moved during the run; 130 interrupted from the keyboard. After 1, 3, 6 and 7 the command can be
retried.

Torchrun exits with 1 whatever the status was, and adds warnings and a traceback of its own: read the line that begins
with "%(prog)s: error:", or each failed rank's status in the error.json of torchrun's --log-dir. With --dry-run, which
needs no torchrun, mistakes in the config and the data are reported alone.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from argparse import Namespace
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from coe_megatron import scratch
from coe_megatron.cli.arguments import Parser, program_name, write_out
from coe_megatron.cli.estimates import estimated, rehearsed, simulated, suggest
from coe_megatron.cli.pretrain import RESUMES, leave
from coe_megatron.config import RunConfig, load
from coe_megatron.config.load import parse
from coe_megatron.distributed.environment import DistributedEnv
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.estimate.dispatch import resolved
from coe_megatron.estimate.machine import machines
from coe_megatron.estimate.run_estimate import vocabulary
from coe_megatron.files import kind_of, problem, require_folder, user_path
from coe_megatron.lean_imports import import_megatron, without_collection
from coe_megatron.run.exit_status import ExitStatus, write_error_file
from coe_megatron.run.lock import FolderInUse
from coe_megatron.run.output_check import require_output
from coe_megatron.training.signals import StopRequest, stop_with_parent

_NEEDS = {
    "device_memory": ("dry_run", "suggest"),
    "machine": ("dry_run", "suggest", "simulate"),
    "routing": ("dry_run",),
    "picture": ("dry_run",),
    "gpus": ("suggest", "simulate", "rehearse"),
    "save_config": ("suggest",),
}  # options that mean something with one of others only


def pretrain(arguments: list[str] | None) -> int:
    """Parse, check, train; returns the exit status."""
    parser = Parser(prog=program_name("coe-pretrain", "pretrain_coe.py"), description=__doc__)
    parser.add_argument(
        "config", type=user_path, help="YAML file, or the name of a packaged config, such as quickstart.yaml"
    )
    parser.add_argument("overrides", nargs="*", default=[], help="key.sub=value, overrides the file")
    estimates = parser.add_mutually_exclusive_group()
    estimates.add_argument(
        "--dry-run", action="store_true", help="print what the run would cost, and exit; needs no data or ranks"
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: print one JSON object")
    fits = (
        "with --dry-run: exit with status 2 if the run needs more than SIZE, such as 80GiB, and suggest what would fit"
    )
    parser.add_argument("--device-memory", metavar="SIZE", help=fits)
    timed = "with --dry-run, --suggest and --simulate: the machine, for the time of a step; a machine file, or one of "
    timed += ", ".join(machines())
    parser.add_argument("--machine", metavar="NAME", help=timed)
    uneven = "with --dry-run and --machine: a run's folder; the busiest rank has the load that its experts had last"
    parser.add_argument("--routing", metavar="RUN", type=user_path, help=uneven)
    draws = "with --dry-run and --machine: draw where the time of a step goes into a PNG"
    parser.add_argument("--picture", metavar="FILE", type=user_path, help=draws)
    finds = "print the five fastest layouts of the run on --machine that fit, and exit; needs no data or ranks"
    estimates.add_argument("--suggest", action="store_true", help=finds)
    fails = "print the goodput of the run on --machine, whose nodes fail, and the best interval of saves, and exit"
    estimates.add_argument("--simulate", action="store_true", help=fails)
    makes = "make the groups, shards, data order, checkpoint plan and SLURM job of all ranks, check them, and exit; "
    estimates.add_argument("--rehearse", action="store_true", help=f"{makes}needs no data or ranks")
    ranks = "with --suggest, --simulate and --rehearse: the number of ranks (default: parallel.world_size, else those "
    ranks += "of a node, and with --rehearse the fewest of the layout)"
    parser.add_argument("--gpus", metavar="N", type=int, help=ranks)
    saves = "with --suggest: write a config with the fastest layout and all other settings of the run"
    parser.add_argument("--save-config", metavar="FILE", type=user_path, help=saves)
    stops = "stop after the current step, with a checkpoint, when this file exists; use a new name for each start"
    parser.add_argument("--stop-file", metavar="FILE", type=user_path, help=stops)
    options = parser.parse_intermixed_args(arguments)
    if options.json and not options.dry_run:
        parser.error("--json needs --dry-run: a run writes its numbers into metrics.jsonl")
    for option, needs in _NEEDS.items():
        if getattr(options, option) is not None and not any(getattr(options, each) for each in needs):
            named = " or ".join(f"--{each.replace('_', '-')}" for each in needs)
            parser.error(f"--{option.replace('_', '-')} needs {named}")
    env = _distributed_env(parser)
    try:
        if options.dry_run or options.suggest or options.simulate or options.rehearse:
            config = load(options.config, options.overrides)
            require_output(config)
            _require_sources(config)
            if env.rank == 0:
                write_out(_estimated(options, config))
            return 0
        if env.rank != 0:
            return _pretrain(parser, env, None, None)
        config = load(options.config, options.overrides, env.world_size)
        require_output(config)
        _require_backend(config)
        run = resolved(config, vocabulary(config, data_needed=True), env.world_size)
        _require_sources(config)
        _require_stop_file(options.stop_file)
        return _pretrain(parser, env, run.config, options.stop_file)
    except FolderInUse as error:
        parser.refuse(ExitStatus.BUSY, str(error))
    except ConfigError as error:
        parser.error(str(error))


def _estimated(options: Namespace, config: RunConfig) -> str:
    memory = options.device_memory
    if options.rehearse:
        return rehearsed(config, options.gpus)
    if options.simulate:
        return simulated(config, options.machine, options.gpus)
    if options.suggest:
        return suggest(config, options.machine, options.gpus, memory, options.save_config)
    return estimated(config, options.machine, memory, options.routing, options.picture, options.json)


def _distributed_env(parser: Parser) -> DistributedEnv:
    """Rank and world size of this process; exits if the variables are invalid, before any file is read."""
    try:
        return DistributedEnv.from_environment(os.environ)
    except ConfigError as error:
        # Under torchrun only the first rank prints; a rank that was started by hand prints its own line.
        parser.refuse(ExitStatus.MISTAKE, str(error), all_ranks="TORCHELASTIC_RUN_ID" not in os.environ)


def _require_backend(config: RunConfig) -> None:
    if config.model.backend == "transformer_engine" and find_spec("transformer_engine") is None:
        raise ConfigError("model.backend is transformer_engine: Transformer Engine is not installed, use local")


def _require_sources(config: RunConfig) -> None:
    """Check that the folders that a new run starts from exist, unless the run resumes from its own checkpoints."""
    if kind_of(Path(config.output) / "checkpoints", "output") is None:
        for name in ("warm_start", "branch_from"):
            if (source := getattr(config.training, name)) is not None:
                require_folder(Path(source), f"training.{name}")


def _require_stop_file(path: Path | None) -> None:
    if path is not None and kind_of(path.parent, "--stop-file") not in (None, "folder"):
        raise problem(path, "--stop-file", f"{path.parent} is not a folder")


def _pretrain(parser: Parser, env: DistributedEnv, checked: RunConfig | None, stop_file: Path | None) -> ExitStatus:
    """Train; `checked` and `stop_file` are given on rank 0 only: a thousand ranks must not all read the config."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent()
    torchruns = env.log_dir.parents[2:3] if env.log_dir and env.local_rank == 0 else ()
    scratch.enter(next(iter(torchruns), None))
    # Imported late: this takes seconds, and mistakes in config or data should be reported at once.
    from coe_megatron.training.console import quiet_libraries

    quiet_libraries()
    with without_collection():
        import_megatron()
        importlib.import_module("torch._dynamo")  # which torch's optimizers import
        from coe_megatron.checkpoint.save_load import CheckpointNotSaved
        from coe_megatron.data.token_file import DamagedTokens
        from coe_megatron.distributed.rendezvous import RendezvousError, rendezvous
        from coe_megatron.run.folder import OutputLost
        from coe_megatron.training.loop import StoppedOnRequest, train

    try:
        store = rendezvous(env)
    except RendezvousError as error:  # under a launcher a node may be lost; otherwise it is the user's mistake
        parser.refuse(ExitStatus.FAILED if env.launched else ExitStatus.MISTAKE, str(error), all_ranks=True)
    if checked is not None:
        store.set("config", json.dumps(asdict(checked)))
    config = parse(json.loads(store.get("config")))
    stop_request = StopRequest(stop_file)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on run.json records how the attempt ends
    report_failure = partial(write_error_file, environment=os.environ)
    try:
        outcome = train(config, env, store, stop_request, report_failure)
    except KeyboardInterrupt:
        leave()
    except DamagedTokens as error:
        whose = f"rank {env.rank}: " if env.world_size > 1 else ""
        parser.refuse(ExitStatus.MISTAKE, f"{whose}{error}", all_ranks=True)
    except ConfigError:
        raise
    except StoppedOnRequest as error:
        status, reason = error.status, f"{error}; {RESUMES}"
    except FloatingPointError as error:
        status, reason = ExitStatus.DIVERGED, str(error)
    except CheckpointNotSaved as error:
        status, reason = ExitStatus.NOT_SAVED, f"{error}; {RESUMES}"
    except OutputLost as error:
        status, reason = ExitStatus.OUTPUT_LOST, str(error)
    except Exception as error:
        report_failure(ExitStatus.FAILED, one_line(f"{type(error).__name__}: {error}"), traceback.format_exc())
        raise
    else:
        if outcome is not None:
            with suppress(SystemExit):  # the run is done, even if stdout is closed
                write_out(outcome.summary())
        return ExitStatus.DONE
    report_failure(status, one_line(reason))
    if env.rank == 0:
        print(reason, file=sys.stderr)
    return status
