"""Entry point of pretraining (coe_megatron/cli/pretraining.py): sets signal handlers before it imports anything."""

import os
import signal
import sys
from typing import Never

RESUMES = "the same command resumes from the most recent checkpoint"
INTERRUPTED = 130  # ExitStatus.INTERRUPTED, which is not imported yet


def leave(*_: object) -> Never:
    """Exit immediately: during an import a library may swallow a KeyboardInterrupt.

    A normal exit of the interpreter would abort if a thread is still writing a checkpoint.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"interrupted; {RESUMES}", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


def main(arguments: list[str] | None = None) -> int:
    """Pretrain; returns the exit status.

    Args:
        arguments: None takes those of the command line and sets the signal handlers of this process.
    """
    if arguments is None:
        signal.signal(signal.SIGINT, leave)  # before the imports, which take seconds
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ranks would inherit SIG_IGN from a launcher
    from coe_megatron.cli.pretraining import pretrain

    return pretrain(arguments)


if __name__ == "__main__":
    sys.exit(main())
