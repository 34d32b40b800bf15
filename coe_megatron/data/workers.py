"""Work spread over processes, its results in order; nothing here imports torch, so that a worker starts fast."""

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


def in_order(function: Callable[..., Result], tasks: Iterable[tuple[Any, ...]], workers: int) -> Generator[Result]:
    """Yield function(*task) for each task in their order, computed by so many processes; by this one if it is 1.

    Tasks are taken as they are needed, a few ahead. The first error, in the order of the tasks, is raised. When the
    generator ends, or is closed, what was begun is waited for and the rest forgotten.

    Raises:
        ChildProcessError: a worker was killed.
    """
    if workers == 1:
        yield from (function(*task) for task in tasks)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_become_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            with _interrupt_held_back():
                waiting.append(pool.submit(function, *task))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError("a worker process was killed (by hand, or for want of memory)") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _become_worker() -> None:
    """Leave Ctrl-C, which strikes the whole group of processes, to the parent, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """SIGINT waits until the end of the block; a process started in it has SIGINT blocked until it changes that."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
