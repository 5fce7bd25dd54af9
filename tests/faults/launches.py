# SPDX-License-Identifier: Apache-2.0
"""The tiny recipe through AutoModel's own CLI, in processes that a test may harm."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from nemo_dsv4_cp.tools.recipes import compose
from tests.faults.recipes import REACHED
from tests.processes import (
    STILL_SECONDS,
    Progress,
    Stuck,
    cpu_environment,
    on_ranks,
    run_to_log,
)

STEPS = 6
FAULT_STEP = 3
# Checkpoints are written after the steps 1, 3 and 5.
STEPS_A_CHECKPOINT = 2
PATIENT_MINUTES = 15
"""What one rank may wait for another where no test is about it: the machine may be busy."""

# A rank's own error, or what torchrun reports of a process. Frames, which begin with a blank, say
# nothing.
_ERROR = re.compile(r"\[rank\d+\]: (?! |Traceback)|E\d{4} .* failed \(exitcode")


def recipe_for(directory: Path, *, cp_size: int, restore_from: Path | None = None, **changes):
    """Return the tiny recipe with checkpoints, of rows short enough for a loaded machine."""
    recipe = compose("tiny_cpu").fields
    recipe["distributed"]["cp_size"] = cp_size
    recipe["dataset"]["seq_length"] = 400
    recipe["dist_env"]["timeout_minutes"] = PATIENT_MINUTES
    recipe["step_scheduler"] |= {
        "max_steps": STEPS,
        "global_batch_size": 2,
        "ckpt_every_steps": STEPS_A_CHECKPOINT,
    }
    recipe["checkpoint"] |= {
        "enabled": True,
        "checkpoint_dir": str(directory),
        "model_save_format": "safetensors",
        "save_consolidated": False,
    }
    if restore_from is not None:
        recipe["checkpoint"]["restore_from"] = str(restore_from)
    for section, values in changes.items():
        known = recipe.get(section)
        recipe[section] = known | values if isinstance(known, dict) else values
    return recipe


def train(directory: Path, recipe, processes: int) -> int:
    """Run a recipe to its end and return the exit status; ``log`` has its output."""
    command = on_ranks(directory, recipe, processes)
    return run_to_log(command, directory / "log", cwd=directory, env=cpu_environment())


def losses(directory: Path) -> dict[int, float]:
    """Return the loss of every step, the last one where a step was done again."""
    steps = [json.loads(line) for line in (directory / "training.jsonl").open()]
    return {step["step"]: step["loss"] for step in steps}


def first_error(log: str) -> str:
    """Return the first line that reports an error."""
    return next((line for line in log.splitlines() if _ERROR.match(line)), "no error at all")


class Harmed:
    """A run with a fault: what happened to it, and when."""

    def __init__(self, directory: Path, recipe, processes: int) -> None:
        self.directory, self.log = directory, directory / "log"
        self._output = self.log.open("wb")
        self._process = subprocess.Popen(
            on_ranks(directory, recipe, processes),
            cwd=directory,
            env=cpu_environment(),
            stdout=self._output,
            stderr=self._output,
        )

    def pids(self) -> list[int]:
        """Return the process ids of all ranks that came to their first step."""
        return [int(path.read_text()) for path in sorted(self.directory.glob("pid_*"))]

    def wait_for_the_fault(self) -> None:
        """Return once the rank is at its fault.

        Raises:
            AssertionError: If the run ended before, or went on no more.
        """
        progress = Progress(time.monotonic(), STILL_SECONDS)
        while not (self.directory / REACHED).exists():
            assert self._process.poll() is None, self.log.read_text(errors="replace")[-6000:]
            if progress.has_ended(time.monotonic(), self.log.stat().st_size):
                raise Stuck(self.log.read_text(errors="replace")[-6000:])
            time.sleep(0.05)

    def status(self, *, within: float) -> tuple[int, float]:
        """Return the exit status and the seconds that it took from now.

        Raises:
            subprocess.TimeoutExpired: If the run did not end in time.
        """
        start = time.monotonic()
        status = self._process.wait(timeout=within)
        return status, time.monotonic() - start

    def alive(self) -> list[int]:
        """Return the ranks' processes that still run."""
        return [pid for pid in self.pids() if _runs(pid)]

    def end(self) -> None:
        """End what is left of it."""
        for pid in [self._process.pid, *self.alive()]:
            if _runs(pid):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, and its status not yet read
