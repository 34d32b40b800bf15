"""Runs torchrun on this host: exits with the ranks' status, and saves a checkpoint when it is asked to stop.

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

EPILOG = """All arguments after -- are passed to torchrun unchanged, and torchrun reads its PET_ variables as usual. On
one host (--standalone, or without --nnodes) the rendezvous is a file and the ranks communicate over the loopback
interface, so no port is open to other hosts.

The first SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or SIGHUP asks the ranks to stop: they finish the current step and at most
one more, then save, and one_host.py waits until the checkpoint is complete. The second signal ends the ranks at once.
Signals that are ignored at the start stay ignored (SIGHUP under nohup). When one_host.py exits, it leaves no process
behind, except those that wait for a disk or device and do not react to SIGKILL; after 30 seconds it names them and
exits.

--max-restarts restarts the ranks from the most recent complete checkpoint if a rank was killed, failed or hung. If a
restart cannot help (an invalid config, a loss that diverged, a full disk), the run ends; torchrun alone would restart
it.

exit status: that of the ranks, taken from the first rank with a status other than 1: 0 done, 1 failed, 2 invalid config
or data, 3 stopped on request and saved, 4 diverged, 5 not saved, 6 busy, 7 hung, 8 output folder lost, 130 ended at
once by a second signal. The first Ctrl-C gives 3, since the ranks are asked to stop (multi_host.py exits with 130
then). With --kubeflow, 128 is added to a status after which a restart may help: the restart policy ExitCode of
Kubeflow's operator then restarts the pod."""


def make_parser() -> Parser:
    parser = Parser(prog=program_name("coe-one-host", "one_host.py"), description=__doc__, epilog=EPILOG)
    restarts = "restarts of the ranks after a failure (default: PET_MAX_RESTARTS, else 0)"
    parser.add_argument("--max-restarts", metavar="N", help=restarts)
    towards = "use the interface of the route to this host (default: chosen by torch and NCCL)"
    parser.add_argument("--towards", metavar="HOST", help=towards)
    watched = "stop at the end of stdin or when it says `stop`, end at once when it says `end` (for multi_host.py)"
    parser.add_argument("--watch-stdin", action="store_true", help=watched)
    parser.add_argument("--kubeflow", action="store_true", help="exit with 128 + status if a restart may help")
    parser.add_argument("torchrun", nargs="+", metavar="ARGUMENT", help="torchrun's arguments")
    return parser


def watch_stdin(requests: Requests) -> None:
    """Follow the requests of a launcher on another host; when it is gone, ask to stop."""
    for line in sys.stdin:
        match line.strip():
            case "stop":
                requests.stop.set()
            case "end":
                requests.end.set()
    requests.stop.set()


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()
    requests = Requests()
    try:
        scratch.enter()
        # In a shared store, ranks that torchrun 2.13 restarts find the addresses of the ranks before them.
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        max_restarts = restarts(options.max_restarts, environment)
        local_address = towards(options.towards, environment) if options.towards else []
    except ConfigError as error:
        parser.error(str(error))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # under nohup, closing the terminal must not stop the run
            signal.signal(number, lambda *_: requests.more())
    preloaded = Preloaded() if is_loaded() else None  # before the thread starts: this forks
    if options.watch_stdin:
        threading.Thread(target=watch_stdin, args=(requests,), daemon=True).start()
    logs = tempfile.mkdtemp(prefix="ranks-")
    own = [f"--log-dir={logs}", f"--max-restarts={max_restarts}", *local_address]
    command = [sys.executable, "-m", "coe_megatron.launcher.torchrun", *own, *options.torchrun]
    status, cause = supervise(command, environment, Path(logs), max_restarts, requests, preloaded)
    if cause:
        reason = f"rank {cause.rank}: {one_line(cause.message)}"
        print(f"{parser.prog}: ended with status {status.value} ({status.name}), {reason}", file=sys.stderr, flush=True)
    return kubeflow(status) if options.kubeflow else status


def restarts(given: str | None, environment: Mapping[str, str]) -> int:
    """The maximum number of restarts, from `--max-restarts` (`given`), else from torchrun's own variable."""
    name = "PET_MAX_RESTARTS" if given is None else "--max-restarts"
    return whole_number(name, environment.get(name, "0") if given is None else given, 0, MOST_RANKS)


def towards(host: str, environment: dict[str, str]) -> list[str]:
    """Torchrun's argument for the source address of the route to `host`; gloo and NCCL use its interface."""
    network.use_interface_towards(host, environment)
    return [f"--local-addr={network.address_towards(host)}"]


def kubeflow(status: ExitStatus) -> int:
    """The status for Kubeflow's restart policy ExitCode, which restarts a pod that exits with 128 or more."""
    return 128 + status if status.retryable else min(status, 127)


if __name__ == "__main__":
    sys.exit(main())
