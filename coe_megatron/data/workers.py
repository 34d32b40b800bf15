"""A parallel map over processes with results in order. It does not import torch, so that workers start fast."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

Result = TypeVar("Result")


def ordered_map(function: Callable[..., Result], tasks: Iterable[tuple[Any, ...]], workers: int) -> Generator[Result]:
    """Yield function(*task) for each task in order, computed by `workers` processes, or by this process if it is 1.

    Tasks are read as needed, a few ahead. The first error in the order of the tasks is raised. When the generator ends
    or is closed, it waits for running tasks and cancels the rest.

    Raises:
        ChildProcessError: a worker was killed.
    """
    if workers == 1:
        yield from (function(*task) for task in tasks)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_init_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            with _block_sigint():
                waiting.append(pool.submit(function, *task))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError("a worker process was killed (by a user, or because memory ran out)") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _init_worker() -> None:
    """Ignore Ctrl-C, which all processes of the group receive and the parent handles; end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _block_sigint() -> Iterator[None]:
    """Defer SIGINT until the end of the block; a process started in it inherits the blocked SIGINT."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
