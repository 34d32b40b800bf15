"""Pretrains a Chain-of-Experts model.

    torchrun --nproc-per-node 2 launch/pretrain_coe.py CONFIG.yaml [key.sub=value ...]

Where the package is installed and no checkout is at hand, `-m coe_megatron.cli.pretrain` is the same program, and
`coe-pretrain` its one rank. A CONFIG.yaml that is not there is looked for among the packaged configs: quickstart.yaml,
gsm8k.yaml, paper/coe-2_4-64.yaml and others, as the folder configs/ of the repository has them.

Run again with the same config, it goes on from its newest checkpoint. Exit status: 0 done; 1 an unexpected
error; 2 a mistake in the config or the data (one line on stderr says which); 3 stopped as asked (SIGTERM, SIGUSR1,
the stop file), and saved; 4 the loss has diverged; 5 a checkpoint could not be written; 6 another run writes the output
folder; 7 the run hung; 8 the output folder was removed or moved while the run went on; 130 interrupted from the
keyboard. After 1, 3, 6 and 7 the same command may be tried again.

Torchrun exits with 1 whatever the status was, and adds warnings and a traceback of its own: the line that begins with
"%(prog)s: error:" is the one to read; with its --log-dir each failed rank's status is in its error.json. With
--dry-run, and no torchrun, mistakes in the config and in prepared data show alone.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from coe_megatron import scratch
from coe_megatron.cli.pretrain import GOES_ON, leave
from coe_megatron.config import RunConfig, load
from coe_megatron.config.arguments import Parser, program_name, write_out
from coe_megatron.config.load import parse
from coe_megatron.data.folders import missing_folders
from coe_megatron.distributed.environment import DistributedEnv
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.estimate.advice import parse_size, refusal
from coe_megatron.estimate.node_crossing import needless_crossing
from coe_megatron.estimate.run_estimate import estimate, vocabulary
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.files import kind_of, problem, require_folder, user_path
from coe_megatron.lean_imports import import_megatron, without_collection
from coe_megatron.run.exit_status import ExitStatus, write_error_file
from coe_megatron.run.lock import FolderInUse
from coe_megatron.run.output_check import require_output
from coe_megatron.training.signals import StopRequest, stop_with_parent


def pretrain(arguments: list[str] | None) -> int:
    """Parse, check, train; returns the exit status."""
    parser = Parser(prog=program_name("coe-pretrain", "pretrain_coe.py"), description=__doc__)
    parser.add_argument(
        "config", type=user_path, help="YAML file, or the name of a packaged config, such as quickstart.yaml"
    )
    parser.add_argument("overrides", nargs="*", default=[], help="key.sub=value, which wins over the file")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would cost; needs no data, no ranks")
    parser.add_argument("--json", action="store_true", help="with --dry-run: say it as one JSON object")
    fits = "with --dry-run: refuse (exit status 2) what needs more, such as 80GiB, and say what would fit"
    parser.add_argument("--device-memory", metavar="SIZE", help=fits)
    stops = "stop after the step at hand, with a checkpoint, when this file exists; a new name for each start"
    parser.add_argument("--stop-file", metavar="FILE", type=user_path, help=stops)
    options = parser.parse_intermixed_args(arguments)
    if options.json and not options.dry_run:
        parser.error("--json goes with --dry-run: a run writes its numbers into metrics.jsonl")
    if options.device_memory is not None and not options.dry_run:
        parser.error("--device-memory goes with --dry-run: a run takes the memory that is there")
    ranks = _ranks(parser)
    try:
        if options.dry_run:
            config = load(options.config, options.overrides)
            require_output(config)
            _require_warm_start(config)
            return _forecast(ranks, config, options.json, options.device_memory)
        if ranks.rank != 0:
            return _pretrain(parser, ranks, None, None)
        config = load(options.config, options.overrides, ranks.world_size)
        require_output(config)
        vocabulary(config, data_needed=True)
        _require_warm_start(config)
        _require_stop_file(options.stop_file)
        return _pretrain(parser, ranks, config, options.stop_file)
    except FolderInUse as error:
        parser.refuse(ExitStatus.BUSY, str(error))
    except ConfigError as error:
        parser.error(str(error))


def _ranks(parser: Parser) -> DistributedEnv:
    """This process's place, or the end: before anything else is read, for a dry run too."""
    try:
        return DistributedEnv.from_environment(os.environ)
    except ConfigError as error:
        # Of torchrun's ranks the first speaks for all; started by hand, each does for itself.
        parser.refuse(ExitStatus.MISTAKE, str(error), aloud="TORCHELASTIC_RUN_ID" not in os.environ)


def _forecast(ranks: DistributedEnv, config: RunConfig, as_json: bool, device_memory: str | None) -> int:
    run = RunShape.of(config, vocabulary(config))
    cost = estimate(run)
    if device_memory is not None:
        try:
            available = parse_size(device_memory)
        except ConfigError as error:
            raise ConfigError(f"--device-memory {error}") from error
        if refused := refusal(run, cost, available):
            raise ConfigError(f"--device-memory {device_memory}: {refused}")
    warnings = [*missing_folders(config.data), *filter(None, [needless_crossing(run, cost)])]
    if ranks.rank == 0:
        as_text = json.dumps({**cost.as_dict(), "warnings": warnings}, indent=2) if as_json else cost.table()
        write_out(as_text if as_json else "\n".join([as_text, *(f"warning: {each}" for each in warnings)]))
    return 0


def _require_warm_start(config: RunConfig) -> None:
    """That there is a folder to begin with, unless the run has checkpoints of its own to go on from."""
    source, own = config.training.warm_start, Path(config.output) / "checkpoints"
    if source is not None and kind_of(own, "output") is None:
        require_folder(Path(source), "training.warm_start")


def _require_stop_file(path: Path | None) -> None:
    if path is not None and kind_of(path.parent, "--stop-file") not in (None, "folder"):
        raise problem(path, "--stop-file", f"{path.parent} is no folder")


def _pretrain(parser: Parser, ranks: DistributedEnv, checked: RunConfig | None, stop_file: Path | None) -> ExitStatus:
    """Args: what rank 0 has, which alone reads files at the start: a thousand ranks would read them all at once."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent()
    torchruns = ranks.log_dir.parents[2:3] if ranks.log_dir and ranks.local_rank == 0 else ()
    scratch.enter(next(iter(torchruns), None))
    # Imported here: the stack takes seconds, and a mistake in config or data should not.
    from coe_megatron.training.console import quiet_libraries

    quiet_libraries()
    with without_collection():
        import_megatron()
        importlib.import_module("torch._dynamo")  # which torch's optimizers import
        from coe_megatron.checkpoint.save_load import CheckpointNotSaved
        from coe_megatron.data.token_file import DamagedTokens
        from coe_megatron.distributed.rendezvous import RendezvousError, rendezvous
        from coe_megatron.run.folder import OutputLost
        from coe_megatron.training.loop import Interrupted, train

    try:
        store = rendezvous(ranks)
    except RendezvousError as error:  # a mistake by hand; where a launcher has set the variables, a node may be lost
        parser.refuse(ExitStatus.FAILED if ranks.launched else ExitStatus.MISTAKE, str(error), aloud=True)
    if checked is not None:
        store.set("config", json.dumps(asdict(checked)))
    config = parse(json.loads(store.get("config")))
    interruption = StopRequest(stop_file)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on there is a run, which notes how it ended
    last_word = partial(write_error_file, environment=os.environ)
    try:
        outcome = train(config, ranks, store, interruption, last_word)
    except KeyboardInterrupt:
        leave()
    except DamagedTokens as error:
        whose = f"rank {ranks.rank}: " if ranks.world_size > 1 else ""
        parser.refuse(ExitStatus.MISTAKE, f"{whose}{error}", aloud=True)
    except ConfigError:
        raise
    except Interrupted as error:
        status, reason = error.status, f"{error}; {GOES_ON}"
    except FloatingPointError as error:
        status, reason = ExitStatus.DIVERGED, str(error)
    except CheckpointNotSaved as error:
        status, reason = ExitStatus.NOT_SAVED, f"{error}; {GOES_ON}"
    except OutputLost as error:
        status, reason = ExitStatus.OUTPUT_LOST, str(error)
    except Exception as error:
        last_word(ExitStatus.FAILED, one_line(f"{type(error).__name__}: {error}"), traceback.format_exc())
        raise
    else:
        if outcome is not None:
            with suppress(SystemExit):  # the run is done, told or not
                write_out(outcome.summary())
        return ExitStatus.DONE
    last_word(status, one_line(reason))
    if ranks.rank == 0:
        print(reason, file=sys.stderr)
    return status
