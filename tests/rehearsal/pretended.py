"""Gives this process, and all that it forks, a pretended CUDA device when imported.

With WAITS=FILE in a program's environment, FILE.RANK gets what made the host wait for the device ("syncs") and
what else was noted ("notes"), as JSON, by line of source with counts; `step_waits` adds the waits of each step.
"""

import atexit
import json
import os

import pretend_cuda

pretend_cuda.install(os.environ["PRETEND_CUDA_BUILD"])
_watching = pretend_cuda.watch()  # kept: a collected context manager would end
_log = _watching.__enter__()


def _write_counts() -> None:
    if (path := os.environ.get("WAITS")) and any(_log.values()):
        with open(f"{path}.{os.environ.get('RANK', '0')}", "w") as file:
            json.dump(_log, file)


atexit.register(_write_counts)
