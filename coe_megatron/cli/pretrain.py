"""Starts a pretraining (coe_megatron/cli/pretraining.py), with its signal handlers set before anything is imported."""

import os
import signal
import sys
from typing import Never

GOES_ON = "the same command goes on from the newest checkpoint"
INTERRUPTED = 130  # spelled out: this comes before all imports of our own


def leave(*_: object) -> Never:
    """End at once: a KeyboardInterrupt in the midst of an import may be lost in a library.

    Python's own way out would abort where a thread is still writing a checkpoint.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"interrupted; {GOES_ON}", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


def main(arguments: list[str] | None = None) -> int:
    """Pretrain as the arguments say; returns the exit status.

    Args:
        arguments: those of the command line when None: then this process is the program, and its signals are set too.
    """
    if arguments is None:
        signal.signal(signal.SIGINT, leave)  # before the imports, which take seconds
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a launcher that ignores it would have its ranks do so as well
    from coe_megatron.cli.pretraining import pretrain

    return pretrain(arguments)


if __name__ == "__main__":
    sys.exit(main())
