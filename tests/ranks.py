"""Runs a function on several gloo ranks, each a fresh process with Megatron's groups set up; used by the `ranks` tier.

A file is the meeting point (no port to guess), a rank that fails or hangs ends the others, and what the ranks return
comes back in rank order. Start-up costs seconds, so a test should do all it has to with one set of ranks in one call.
"""

import multiprocessing
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_ranks(function: Callable, world_size: int, *args: Any, seconds: float = 180, **layout: int) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks and return their results in rank order.

    `layout` goes to Megatron's `initialize_model_parallel` (`expert_model_parallel_size=2`, ...). The function has to
    stand at the top level of a module; arguments and results are pickled (return numbers or detached CPU tensors).
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'rendezvous'}"
        processes = [
            context.Process(target=_rank, args=(rank, world_size, meeting, layout, function, args, results))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            found = _collect(results, processes, time.monotonic() + seconds)
            for process in processes:  # may have processes of its own to end, such as the writer of a checkpoint
                process.join(timeout=10)
            return found
        finally:
            for process in processes:
                process.kill()
                process.join()


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
    rank: int, world_size: int, meeting: str, layout: dict, function: Callable, args: tuple, results: Any
) -> None:
    try:
        start_groups(rank, world_size, meeting, **layout)
        # Pickled here and by value: torch would pass tensors as open files, which close when this process ends.
        results.put((rank, True, pickle.dumps(function(*args))))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    results.close()
    results.join_thread()  # the result is on its way before this process ends


def start_groups(rank: int, world_size: int, meeting: str, seed: int = 1234, **layout: int) -> None:
    """One gloo rank with Megatron's groups, seeds and the compatibility parts, on one thread."""
    from coe_megatron.parallel import without_cuda, without_te

    without_te.install()
    without_cuda.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(**layout)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
