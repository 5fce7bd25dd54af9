# SPDX-License-Identifier: Apache-2.0
"""Train a tiny V4 with context parallelism and without, and compare the losses.

Run it with `python -m nemo_dsv4_cp.cli.demo`. It needs no GPU and no download.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nemo_dsv4_cp.cli.compose import recipe_text
from nemo_dsv4_cp.tools.recipes import compose

# The runs start from the same weights, so before the first update only rounding can differ. Later,
# rounding may flip a near tie of experts or index scores. (Seen so far: 1e-6 at any step.)
FIRST_STEP_TOLERANCE = 1e-5
STEP_TOLERANCE = 5e-4

_LOGGED_STEP = re.compile(r"\| step \d+ \| epoch \d+ \| loss ")
# A rank's error, without the frames that led there.
_RANK_ERROR = re.compile(r"\[rank\d+\]: (?! |Traceback)")
_LOG_LINES_SHOWN = 15


@dataclass(frozen=True)
class Training:
    """The losses and the time of one run of the recipe."""

    losses: list[float]
    seconds: float


class TrainingFailed(Exception):
    """A run that ended with an error, which its log holds."""

    def __init__(self, log: Path, status: int) -> None:
        super().__init__(f"The training ended with status {status}. From its log, {log}:")
        self.log = log

    def last_lines(self) -> str:
        """The ranks' last errors, or the end of the log if no rank had one."""
        lines = self.log.read_text(errors="replace").splitlines()
        # torchrun closes with a page about itself; the errors stand above that.
        errors = [line for line in lines if _RANK_ERROR.match(line)]
        return "\n".join((errors or lines)[-_LOG_LINES_SHOWN:])


def train(
    recipe: Path,
    *,
    cp_size: int,
    directory: Path,
    on_step: Callable[[int], None],
    processes: int | None = None,
) -> Training:
    """Run a recipe through AutoModel's own command line.

    Args:
        recipe: The YAML file.
        cp_size: CP ranks.
        directory: Empty; receives `log` and AutoModel's `training.jsonl`.
        on_step: Receives how many steps are done, again and again.
        processes: As many as CP ranks by default.

    Raises:
        TrainingFailed: The run ended with an error.
    """
    log = directory / "log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [
        f"--nproc-per-node={processes or cp_size}",
        "-m",
        "nemo_automodel.cli.app",
        str(recipe),
    ]
    command += [f"--distributed.cp_size={cp_size}", f"--checkpoint.checkpoint_dir={directory}"]
    # One thread per process for both: no more threads than cores, and the same order of summation.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    with (
        log.open("w") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process,
    ):
        try:
            while process.poll() is None:
                on_step(len(_LOGGED_STEP.findall(log.read_text(errors="replace"))))
                time.sleep(0.2)
        finally:
            process.terminate()
            process.wait()
    if process.returncode != 0:
        raise TrainingFailed(log, process.returncode)
    with (directory / "training.jsonl").open() as records:
        losses = [json.loads(record)["loss"] for record in records]
    on_step(len(losses))
    return Training(losses, time.monotonic() - start)


def complaints(with_cp: list[float], without_cp: list[float]) -> list[str]:
    """Return what is wrong with the losses of the same steps; nothing if all is well."""
    if len(with_cp) != len(without_cp) or not with_cp:
        return [f"{len(with_cp)} steps with context parallelism and {len(without_cp)} without"]
    found = []
    for step, (ours, reference) in enumerate(zip(with_cp, without_cp, strict=True)):
        tolerance = STEP_TOLERANCE if step else FIRST_STEP_TOLERANCE
        # Not `>`, which lets NaN pass.
        if not abs(ours - reference) <= tolerance:
            found.append(f"at step {step} the losses differ by more than {tolerance:g}")
    if not with_cp[-1] < with_cp[0]:
        found.append(f"the loss did not fall: {with_cp[0]:.4f} at first, {with_cp[-1]:.4f} at last")
    return found


def main() -> int:
    """Run the demo; return 1, and keep its files, when a run failed or the losses disagree."""
    console = Console()
    directory = Path(tempfile.mkdtemp(prefix="nemo-dsv4-cp-demo-"))
    try:
        recipe = directory / "recipe.yaml"
        recipe.write_text(recipe_text(compose("tiny_cpu"), ["tiny_cpu"], recipe))
        with_cp = _train_with_bar(recipe, 2, directory / "cp2", console)
        without_cp = _train_with_bar(recipe, 1, directory / "cp1", console)
    except TrainingFailed as failure:
        console.print(failure, style="bold red", soft_wrap=True)
        console.print(failure.last_lines(), markup=False, highlight=False, soft_wrap=True)
        return _kept(directory, console, status=1)
    except KeyboardInterrupt:
        console.print("Stopped.")
        return _kept(directory, console, status=130)
    _print_comparison(with_cp, without_cp, console)
    found = complaints(with_cp.losses, without_cp.losses)
    for complaint in found:
        console.print(f"Not as it should be: {complaint}", style="bold red")
    if found:
        return _kept(directory, console, status=1)
    console.print("The same training, with and without context parallelism.", style="green")
    shutil.rmtree(directory)
    return 0


def _kept(directory: Path, console: Console, *, status: int) -> int:
    """Print where the recipe, the logs and the losses are, and return the status."""
    console.print(f"Kept: {directory}", soft_wrap=True)
    return status


def _train_with_bar(recipe: Path, cp_size: int, directory: Path, console: Console) -> Training:
    directory.mkdir()
    steps = yaml.safe_load(recipe.read_text())["step_scheduler"]["max_steps"]
    console.print(f"Training at CP={cp_size}, log: {directory / 'log'}", soft_wrap=True)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps)
        return train(
            recipe,
            cp_size=cp_size,
            directory=directory,
            on_step=lambda done: progress.update(task, completed=done),
        )


def _print_comparison(with_cp: Training, without_cp: Training, console: Console) -> None:
    table = Table()
    for header in ("step", "loss CP=2", "loss CP=1", "difference"):
        table.add_column(header, justify="right")
    pairs = list(zip(with_cp.losses, without_cp.losses, strict=False))
    for step, (ours, reference) in enumerate(pairs):
        table.add_row(str(step), f"{ours:.6f}", f"{reference:.6f}", f"{ours - reference:+.1e}")
    differences = [abs(ours - reference) for ours, reference in pairs]
    console.print(table)
    console.print(f"Largest difference: {max(differences):.1e} (allowed: {STEP_TOLERANCE:.0e})")
    console.print(f"At the first step: {differences[0]:.1e} (allowed: {FIRST_STEP_TOLERANCE:.0e})")
    console.print(
        f"Start-up and {len(pairs)} steps: {with_cp.seconds:.0f} s at CP=2 (2 processes), "
        f"{without_cp.seconds:.0f} s at CP=1 (1 process)"
    )


if __name__ == "__main__":
    sys.exit(main())
