"""Torchrun as our launchers start it: on one host it opens no port, and a mistake in its arguments is one line.

Torchrun's rendezvous and the store that it serves listen on all interfaces, on one host too (`--standalone`). A file
does for one host; the ranks then meet at a store that rank 0 serves on the loopback interface. Arguments are those of
torchrun, which reads PET_ variables too.
"""

import argparse
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path

from coe_megatron import scratch
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import require_file
from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.training.signals import stop_with_parent


def stay_on_host(options: argparse.Namespace) -> None:
    """Have torchrun's own arguments say that the ranks of this one host meet by a file."""
    options.standalone = False
    options.rdzv_backend, options.rdzv_conf = "c10d", "store_type=file"
    options.rdzv_endpoint = str(Path(tempfile.gettempdir(), f"rendezvous-{uuid.uuid4().hex[:8]}"))
    options.rdzv_id = uuid.uuid4().hex if options.rdzv_id == "none" else options.rdzv_id
    options.local_addr = "127.0.0.1"
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or torchrun would serve a second store


def main(arguments: list[str]) -> None:
    """Parse as torchrun does, and run the ranks."""
    from torch.distributed import run  # takes seconds
    from torch.distributed.elastic.multiprocessing.errors import record

    options = run.parse_args(arguments)
    try:
        if options.standalone or run.parse_min_max_nnodes(options.nnodes)[1] == 1:
            stay_on_host(options)
        if not (options.module or options.no_python):
            require_file(Path(options.training_script), "the program")
        options.master_port = options.master_port or 29500  # as torchrun has it; for --rdzv-backend static alone
        config, entry, words = run.config_from_args(options)
    except (ValueError, RuntimeError, AssertionError) as error:  # torchrun's own, of numbers such as 1:2:3 and 2:1
        own = ", ".join(f"{name} is {value!r:.100}" for name, value in os.environ.items() if name.startswith("PET_"))
        sys.stderr.write(f"torchrun: error: {one_line(str(error))}{f' ({own})' if own else ''}\n")
        sys.exit(ExitStatus.MISTAKE)
    record(lambda: run.elastic_launch(config=config, entrypoint=entry)(*words))()


if __name__ == "__main__":
    # When one_host.py is killed, the ranks save and stop; torchrun, asked to end, would kill them after 30 seconds.
    stop_with_parent(signal.SIGKILL)
    try:
        scratch.enter()
    except ConfigError as mistake:
        sys.stderr.write(f"torchrun: error: {mistake}\n")
        sys.exit(ExitStatus.MISTAKE)
    main(sys.argv[1:])
