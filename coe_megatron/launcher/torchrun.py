"""Starts torchrun without open ports on a single host, and reports errors in its arguments in one line.

Torchrun's rendezvous and its store listen on all interfaces, even on a single host (`--standalone`). This module uses a
file for the rendezvous on a single host; rank 0 then hosts the ranks' store on the loopback interface. It takes
torchrun's arguments and, like torchrun, PET_ variables.
"""

import argparse
import os
import signal
import sys
import tempfile
import uuid
from functools import partial
from pathlib import Path

from coe_megatron import scratch
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import require_file
from coe_megatron.launcher.preloaded import Popen, Preloaded, is_loaded, load, without_gpu
from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.training.signals import stop_with_parent

_TRAINING = ("pretrain_coe.py", "coe_megatron.cli.pretrain")


def use_file_rendezvous(options: argparse.Namespace) -> None:
    """Set torchrun's arguments for a rendezvous by a file on this host."""
    options.standalone = False
    options.rdzv_backend, options.rdzv_conf = "c10d", "store_type=file"
    options.rdzv_endpoint = str(Path(tempfile.gettempdir(), f"rendezvous-{uuid.uuid4().hex[:8]}"))
    options.rdzv_id = uuid.uuid4().hex if options.rdzv_id == "none" else options.rdzv_id
    options.local_addr = "127.0.0.1"
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # otherwise torchrun hosts a second store


def main(arguments: list[str]) -> None:
    """Parse torchrun's arguments and run the ranks."""
    from torch.distributed import run  # takes seconds
    from torch.distributed.elastic.multiprocessing.errors import record

    options = run.parse_args(arguments)
    try:
        if options.standalone or run.parse_min_max_nnodes(options.nnodes)[1] == 1:
            use_file_rendezvous(options)
        if not (options.module or options.no_python):
            require_file(Path(options.training_script), "the program")
        options.master_port = options.master_port or 29500  # torchrun's default; only for --rdzv-backend static
        config, entrypoint, program_arguments = run.config_from_args(options)
    except (ValueError, RuntimeError, AssertionError) as error:  # raised by torchrun, for values such as 1:2:3 and 2:1
        own = ", ".join(f"{name} is {value!r:.100}" for name, value in os.environ.items() if name.startswith("PET_"))
        sys.stderr.write(f"torchrun: error: {one_line(str(error))}{f' ({own})' if own else ''}\n")
        sys.exit(ExitStatus.MISTAKE)
    if not is_loaded() and without_gpu() and Path(options.training_script).name in _TRAINING:
        load()  # once, instead of once per rank
    if is_loaded():
        _start_ranks_from(Preloaded())
    _name_events_cheaply()
    record(lambda: run.elastic_launch(config=config, entrypoint=entrypoint)(*program_arguments))()


def _start_ranks_from(preloaded: Preloaded) -> None:
    """Make torchrun fork its ranks from this process."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = partial(Popen, preloaded=preloaded)  # type: ignore[misc,assignment]


def _name_events_cheaply() -> None:
    """Replace the function with which torchrun's rendezvous finds the name of the calling method.

    Torch's own inspects the whole stack and all imported modules, twelve times: this takes half a second after `load`.
    """
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name


if __name__ == "__main__":
    # If one_host.py is killed, so is torchrun: the ranks then save and stop. A SIGTERM to torchrun would instead make
    # it kill them after 30 seconds.
    stop_with_parent(signal.SIGKILL)
    try:
        scratch.enter()
    except ConfigError as mistake:
        sys.stderr.write(f"torchrun: error: {mistake}\n")
        sys.exit(ExitStatus.MISTAKE)
    main(sys.argv[1:])
