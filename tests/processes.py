# SPDX-License-Identifier: Apache-2.0
"""Commands that may take as long as they need while they go on: a loaded machine is no error."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

STILL_SECONDS = 15 * 60
"""How long a log may stay as it is: a tiny model's step takes seconds, minutes if all is busy."""


class Stuck(AssertionError):
    """A command that went on no more; the message is the end of its log."""


class Progress:
    """Detects by the length of a log whether the process that writes it makes progress."""

    def __init__(self, start: float, still_seconds: float) -> None:
        self._grown, self._length, self._still_seconds = start, 0, still_seconds

    def has_ended(self, now: float, length: int) -> bool:
        """Return whether the log has kept its length for longer than it may."""
        if length > self._length:
            self._grown, self._length = now, length
        return now - self._grown > self._still_seconds


def run_to_log(
    command: Sequence[str], log: Path, *, still_seconds: float = STILL_SECONDS, **kwargs: Any
) -> int:
    """Run a command with all its output in ``log`` and return its exit status.

    Raises:
        Stuck: The log did not grow for ``still_seconds``; the command was ended.
    """
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, **kwargs) as process,
    ):
        progress = Progress(time.monotonic(), still_seconds)
        try:
            while (status := process.poll()) is None:
                if progress.has_ended(time.monotonic(), log.stat().st_size):
                    end = log.read_text(errors="replace")[-6000:]
                    raise Stuck(f"nothing new for {still_seconds:g} s after:\n{end}")
                time.sleep(0.1)
        finally:
            process.terminate()  # torchrun ends its ranks then
    return status


def on_ranks(directory: Path, recipe: dict[str, Any], processes: int, *program: str) -> list[str]:
    """Write a recipe into a directory and return torchrun's command for it.

    Args:
        directory: Receives ``recipe.yaml``.
        recipe: What the program is called with.
        processes: How many ranks.
        program: What runs on each rank, AutoModel's command line by default.
    """
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes)]
    return [*command, *(program or ("-m", "nemo_automodel.cli.app")), str(path)]


def cpu_environment() -> dict[str, str]:
    """Return the environment of ranks on this machine's CPU that import these tests.

    One thread per rank: torchrun sets this for several processes only, and one process with all
    threads trains the tiny model several times slower.
    """
    root = str(Path(__file__).parents[1])
    return os.environ | {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
