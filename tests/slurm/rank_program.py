"""coe-pretrain as the tests of SLURM start it: each rank notes where it is, and may wait or die in a step.

COE_TEST_WAIT=STEP:FILE    from that step on wait before each, until asked to stop or until the file exists
COE_TEST_DEAF=STEP:FILE    in the job's first start the same, but being asked to stop does not help, at no step
COE_TEST_KILL=RANK:STEP    this rank kills itself before that step
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from coe_megatron.cli.pretrain_itself import RESUMES, leave, main  # type: ignore[import-not-found]

from coe_megatron.run.exit_status import ExitStatus

__all__ = ["RESUMES", "leave", "main"]
NOTED = ("SLURM", "COE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GLOO_", "NCCL_", "TORCHELASTIC_", "SITE_")


def note() -> None:
    attempt = Path(os.environ["COE_ATTEMPT"])
    seen = {name: value for name, value in os.environ.items() if name.startswith(NOTED)}
    (attempt / f"seen-by-{os.environ['RANK']}.json").write_text(json.dumps({"argv": sys.argv, "environment": seen}))


def disturb() -> None:
    from coe_megatron.lean_imports import import_megatron
    from coe_megatron.training.console import quiet_libraries

    quiet_libraries()
    import_megatron()
    from coe_megatron.training import loop, signals

    waits_before, _, let_go = os.environ.get("COE_TEST_WAIT", "0:.").partition(":")
    deaf_before, _, mended = os.environ.get("COE_TEST_DEAF", "0:.").partition(":")
    dies, _, dies_before = os.environ.get("COE_TEST_KILL", "-1:0").partition(":")
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        mended = "."
    stop, train_step = Path(os.environ["COE_ATTEMPT"]) / "stop", loop.Pretraining._train_step
    status = signals.StopRequest.status

    def step(self: loop.Pretraining, number: int):
        while number + 1 >= int(waits_before) and not stop.exists() and not Path(let_go).exists():
            time.sleep(0.1)
        while number + 1 >= int(deaf_before) and not Path(mended).exists():
            time.sleep(0.1)
        if dies == os.environ["RANK"] and number + 1 == int(dies_before):
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, number)

    def heard(self: signals.StopRequest) -> ExitStatus:
        return status(self) if Path(mended).exists() else ExitStatus.DONE

    loop.Pretraining._train_step = step
    signals.StopRequest.status = heard


if __name__ == "__main__":
    note()
    if {"COE_TEST_WAIT", "COE_TEST_DEAF", "COE_TEST_KILL"} & set(os.environ):
        disturb()
    sys.exit(main())
