"""Runs a function on several gloo ranks, each a process of its own with Megatron's groups set up.

The ranks are forked from a server that has imported torch, Megatron-Core, DeepSpeed and the package once, so a rank
starts in milliseconds. A file is the meeting point (no port to guess), a rank that fails or hangs ends the others, and
what the ranks return comes back in rank order.
"""

import gc
import multiprocessing.forkserver
import os
import pickle
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

IMPORTED_ONCE = ["deepspeed", "megatron.core.models.gpt", "coe_megatron.training.loop"]


def run_ranks(function: Callable, world_size: int, *args: Any, seconds: float = 180, **layout: int) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks and return their results in rank order.

    `layout` goes to Megatron's `initialize_model_parallel` (`expert_model_parallel_size=2`, ...). The function has to
    stand at the top level of a module; arguments and results are pickled (return numbers or detached CPU tensors).
    """
    context = _context()
    results, over = context.Queue(), context.Event()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'rendezvous'}"
        work = (meeting, layout, dict(os.environ), function, args, results, over)
        processes = [context.Process(target=_rank, args=(rank, world_size, *work)) for rank in range(world_size)]
        for process in processes:
            process.start()
        try:
            found = _collect(results, processes, time.monotonic() + seconds)
            over.set()
            for process in processes:  # may have processes of its own to end, such as the writer of a checkpoint
                process.join(timeout=10)
            return found
        finally:
            for process in processes:
                process.kill()
                process.join()


def _context() -> Any:
    """That of the one server, which takes this process's path and environment when it is first needed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # Python 3.11's server ignores sys.path
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _collect(results: Any, processes: list, deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(processes):
        try:
            rank, ok, value = results.get(timeout=1)
        except queue.Empty:
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks {sorted(set(range(len(processes))) - set(found))} did not finish") from None
            died = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in found]
            assert not died, f"ranks {died} died without a word"
            continue
        assert ok, f"rank {rank} failed:\n{value}"
        found[rank] = pickle.loads(value)
    return [found[rank] for rank in range(len(processes))]


def _rank(
    rank: int,
    world_size: int,
    meeting: str,
    layout: dict,
    environment: dict,
    function: Callable,
    args: tuple,
    results: Any,
    over: Any,
) -> None:
    gc.freeze()  # what the server has imported: no collection of garbage looks at it again
    os.environ.clear()
    os.environ.update(environment)
    try:
        start_groups(rank, world_size, meeting, **layout)
        # Pickled here and by value: torch would pass tensors as open files, which close when this process ends.
        results.put((rank, True, pickle.dumps(function(*args))))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    results.close()
    results.join_thread()  # the result is on its way before this process ends
    over.wait()  # a rank that ends breaks the connections of one that is still at work


def start_groups(rank: int, world_size: int, meeting: str, seed: int = 1234, **layout: int) -> None:
    """One gloo rank with Megatron's groups, seeds and the compatibility parts, on one thread."""
    from coe_megatron.local_backend import megatron_compat, without_cuda

    megatron_compat.install()
    without_cuda.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(**layout)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
