"""Torchrun on this host, which ends with the exit status of its ranks and can be asked to stop.

%(prog)s [--max-restarts N] -- --nproc-per-node 8 launch/pretrain_coe.py CONFIG.yaml
"""

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from coe_megatron import scratch
from coe_megatron.cli.arguments import Parser, program_name
from coe_megatron.distributed.environment import MOST_RANKS, whole_number
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.launcher import network
from coe_megatron.launcher.preloaded import Preloaded, is_loaded
from coe_megatron.launcher.torchrun_supervisor import Requests, supervise
from coe_megatron.run.exit_status import ExitStatus

EPILOG = """Everything after -- goes to torchrun as it is; what torchrun reads from PET_ variables holds too.
On one host (--standalone, or without --nnodes) the ranks meet by a file and at the loopback address: no port is open to
other hosts.

The first SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or SIGHUP asks the ranks to stop: they finish the step at hand and save, for
as long as that takes. The second ends all at once. What it was started to ignore (SIGHUP
under nohup) it ignores. However it ends, no process of it is left, but for those that no signal ends (they wait for a
disk or a device), which it names after half a minute.

--max-restarts starts the ranks again, from the newest checkpoint, when one was killed, failed or hung. What a restart
cannot help (a mistake, a loss that diverged, a full disk) ends the run at once; torchrun alone would start it again.

exit status: that of the ranks as pretrain_coe.py has it, by the first of them that says more than "failed": 0 done,
1 failed, 2 a mistake, 3 stopped and saved, 4 diverged, 5 not saved, 6 busy, 7 hung, 130 ended at once. With --kubeflow
128 is added where starting again may help, which the restart policy ExitCode of Kubeflow's operator then does."""


def parser() -> Parser:
    made = Parser(prog=program_name("coe-one-host", "one_host.py"), description=__doc__, epilog=EPILOG)
    restarts = "how often ranks that failed are started again (default: PET_MAX_RESTARTS, else 0)"
    made.add_argument("--max-restarts", metavar="N", help=restarts)
    towards = "talk to other hosts through the interface that leads to this one (default: torch's and NCCL's choice)"
    made.add_argument("--towards", metavar="HOST", help=towards)
    watched = "stop when stdin ends or says `stop`; end at once when it says `end` (multi_host.py asks for this)"
    made.add_argument("--watch-stdin", action="store_true", help=watched)
    made.add_argument("--kubeflow", action="store_true", help="exit with 128 + status where starting again may help")
    made.add_argument("torchrun", nargs="+", metavar="ARGUMENT", help="torchrun's arguments")
    return made


def watch(requests: Requests) -> None:
    """Follow what a launcher elsewhere says, until it is gone."""
    for line in sys.stdin:
        match line.strip():
            case "stop":
                requests.stop.set()
            case "end":
                requests.end.set()
    requests.stop.set()


def main() -> int:
    program = parser()
    options = program.parse_args()
    requests = Requests()
    try:
        scratch.enter()
        # With its store shared, ranks that torchrun 2.13 starts again find there where those before them listened.
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        max_restarts = restarts(options.max_restarts, environment)
        local = towards(options.towards, environment) if options.towards else []
    except ConfigError as error:
        program.error(str(error))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # under nohup a terminal that is closed is none of its business
            signal.signal(number, lambda *_: requests.more())
    preloaded = Preloaded() if is_loaded() else None  # before the thread is begun
    if options.watch_stdin:
        threading.Thread(target=watch, args=(requests,), daemon=True).start()
    logs = tempfile.mkdtemp(prefix="ranks-")
    own = [f"--log-dir={logs}", f"--max-restarts={max_restarts}", *local]
    command = [sys.executable, "-m", "coe_megatron.launcher.torchrun", *own, *options.torchrun]
    status, cause = supervise(command, environment, Path(logs), max_restarts, requests, preloaded)
    if cause:
        told = f"rank {cause.rank}: {one_line(cause.message)}"
        print(f"{program.prog}: ended with status {status.value} ({status.name}), {told}", file=sys.stderr, flush=True)
    return kubeflow(status) if options.kubeflow else status


def restarts(asked: str | None, environment: Mapping[str, str]) -> int:
    """How often failed ranks are started again: as asked for here, else as torchrun's own variable says."""
    name = "PET_MAX_RESTARTS" if asked is None else "--max-restarts"
    return whole_number(name, environment.get(name, "0") if asked is None else asked, 0, MOST_RANKS)


def towards(host: str, environment: dict[str, str]) -> list[str]:
    """Torchrun's arguments for the address this host has towards another; gloo and NCCL get the interface."""
    network.use_interface_towards(host, environment)
    return [f"--local-addr={network.address_towards(host)}"]


def kubeflow(status: ExitStatus) -> int:
    """The status as Kubeflow's restart policy ExitCode reads it: from 128 on a pod is started again."""
    return 128 + status if status.retryable else min(status, 127)


if __name__ == "__main__":
    sys.exit(main())
