"""SIGKILL at random moments of a save: the most recent complete checkpoint is usable, and no process is left over."""

import contextlib
import io
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_build import make_engine
from ranks import start_groups

from coe_megatron.checkpoint import listing, save_load
from coe_megatron.checkpoint.background import Background
from coe_megatron.checkpoint.names import step_of
from coe_megatron.zero import optimizer_states
from coe_megatron.zero.engine import Engine

KILLS = 20


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_a_process_killed_while_it_saves_goes_on_from_a_whole_checkpoint(background: bool, tmp_path: Path) -> None:
    """The killed ones are forked, since a start costs seconds, from a process that has no threads yet."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        unfinished = pool.apply(save_and_be_killed, (tmp_path, background))
    assert unfinished > 0, "some moments should fall into the midst of writing"


def save_and_be_killed(folder: Path, background: bool) -> int:
    """How often a kill left a save unfinished."""
    moments, done, unfinished = random.Random(background), 0, 0
    for _ in range(KILLS):
        done = one_killed(folder, background, done, moments.random())
        unfinished += any(folder.glob("*.tmp"))
        with contextlib.redirect_stderr(io.StringIO()):
            newest = listing.latest_complete(folder)
        found = 0 if newest is None else step_of(newest)
        assert found >= done, f"step {done} was reported as saved, but {found} is the most recent complete one"
    assert done >= 2 * KILLS
    return unfinished


def one_killed(folder: Path, background: bool, done: int, share: float) -> int:
    """Fork a process that goes on where the last one stood, and kill it; the last step it said to have saved.

    Args:
        share: of the time that a save takes; so long after its second save it is killed, in the midst of its third.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            for step in saved_steps(folder, background):
                os.write(writing, f"{step}\n".encode())
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as said:
        began = said.readline()
        assert began and int(began) >= done, "it could not go on"
        first, clock = said.readline(), time.perf_counter()
        second = said.readline()
        time.sleep(share * (time.perf_counter() - clock))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        with pytest.raises(ProcessLookupError):  # nothing that it started lives on
            os.killpg(pid, 0)
        assert first and second, "it could not save"
        return int([second, *said][-1])


def saved_steps(folder: Path, background: bool) -> Iterator[int]:
    """Go on, and save for ever; every value in a checkpoint is the step's number."""
    start_groups(0, 1, f"file://{tempfile.mkdtemp(dir=folder.parent)}/rendezvous")
    engine = make_engine(8, layers=1)
    thread = Background() if background else None
    step = (save_load.load_latest(folder, engine) or {"step": 0})["step"]
    if step:
        assert {float(value) for tensor in held(engine) for value in tensor.unique()} == {float(step)}
    while True:
        yield step
        fill(engine, step + 1)
        save_load.save(folder, step + 1, engine, {"step": step + 1}, keep=2, background=thread)
        if thread is not None:
            fill(engine, -1)
            thread.wait()
        step += 1


def held(engine: Engine) -> Iterator[torch.Tensor]:
    for parameter in engine.module.parameters():
        yield parameter
        for kind in optimizer_states.KINDS:
            yield optimizer_states.read(engine, parameter, kind)


def fill(engine: Engine, value: float) -> None:
    for parameter in engine.module.parameters():
        whole = torch.full(parameter.shape, float(value))
        optimizer_states.write_weight(engine, parameter, whole)
        for kind in optimizer_states.KINDS:
            optimizer_states.write(engine, parameter, kind, whole)
