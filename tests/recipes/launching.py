# SPDX-License-Identifier: Apache-2.0
"""Launches of AutoModel's CLI on forked processes: importing AutoModel takes longer than two steps.

One server process imports AutoModel and the plugin. For each launch it forks a process per rank,
which calls the CLI's ``main`` as a rank of torchrun does. Run this module to start a server.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import yaml

from tests.processes import STILL_SECONDS, Progress, Stuck, cpu_environment

STARTED = "started"
"""File in a launch's directory, there once its ranks came to the first optimizer step."""


class Failed(AssertionError):
    """A launch of which a rank raised; the message is the traceback of the first that did."""

    def __init__(self, message: str, *, trained: bool = False) -> None:
        """Tell also whether ranks had come to the first optimizer step."""
        super().__init__(message)
        self.trained = trained


class Training(NamedTuple):
    """Losses and gradient norms, one a step, and where the rest was written."""

    losses: list[float]
    norms: list[float]
    directory: Path


class Launcher:
    """Launches recipes, one at a time."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None

    def launch(
        self,
        directory: Path,
        recipe: dict[str, Any],
        processes: int,
        *,
        still_seconds: float = STILL_SECONDS,
    ) -> None:
        """Run a recipe to its end.

        Args:
            directory: Receives the recipe, the log of all ranks and what the recipe writes.
            recipe: What AutoModel's CLI is called with.
            processes: How many ranks.
            still_seconds: How long the log may stay as it is.

        Raises:
            Failed: A rank raised. All others were ended.
            Stuck: Nothing new was logged for ``still_seconds``. All ranks were ended.
        """
        log = directory / "log"
        log.touch()
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.recipes.launching"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,  # a line that is buffered here would not wake `select`
                # With pipeline stages AutoModel requests a config from the hub, again and again.
                env=cpu_environment() | {"HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )
            self._answer(log, STILL_SECONDS)  # ready
        recipe["checkpoint"]["checkpoint_dir"] = str(directory)
        (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        # As torchrun does: this process keeps the store, on a port that the system picks.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = {"directory": str(directory), "processes": processes, "port": store.port}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(job).encode() + b"\n")
        ranks = self._answer(log, STILL_SECONDS)
        try:
            statuses = self._answer(log, still_seconds)
        except Stuck:
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
            self._answer(log, STILL_SECONDS)
            raise
        if any(statuses):
            errors = sorted(directory.glob("error_*"), key=lambda path: path.stat().st_mtime_ns)
            end = log.read_text(errors="replace")[-6000:]
            message = errors[0].read_text() if errors else f"exit {statuses} after:\n{end}"
            raise Failed(message, trained=(directory / STARTED).exists())

    def train(
        self, directory: Path, recipe: dict[str, Any], processes: int, changes: dict[str, Any]
    ) -> Training:
        """Train a recipe with sections changed: mappings are merged, other values replace."""
        for section, values in changes.items():
            known = recipe.get(section)
            recipe[section] = (known or {}) | values if isinstance(values, dict) else values
        recipe["dist_env"]["timeout_minutes"] = 15  # of one rank for another, on a busy machine
        self.launch(directory, recipe, processes)
        steps = [json.loads(step) for step in (directory / "training.jsonl").open()]
        return Training(
            [step["loss"] for step in steps], [step["grad_norm"] for step in steps], directory
        )

    def _answer(self, log: Path, still_seconds: float) -> list[int]:
        """Return the server's next line: nothing, process ids of ranks, or their exit statuses."""
        server = self._server
        assert server is not None and server.stdout is not None
        progress = Progress(time.monotonic(), still_seconds)
        while not select.select([server.stdout], [], [], 0.1)[0]:
            if progress.has_ended(time.monotonic(), log.stat().st_size):
                end = log.read_text(errors="replace")[-6000:]
                raise Stuck(f"nothing new for {still_seconds:g} s after:\n{end}")
        answer = server.stdout.readline()
        if not answer:
            self.stop()
            raise Failed("the server of recipe launches ended; its error is on standard error")
        numbers: list[int] = json.loads(answer)
        return numbers

    def stop(self) -> None:
        """End the server and all that it started."""
        if self._server is not None:
            if self._server.poll() is None:
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.communicate()
            self._server = None


def _serve() -> None:
    """Fork the ranks of each launch that a line of standard input describes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    torch.set_num_threads(1)
    # Imported here and not by ranks: all that a launch needs.
    import tests.recipes.preloaded  # noqa: F401

    gc.collect()
    gc.freeze()  # so that collecting garbage copies no page of this process
    print("[]", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        directory = Path(job["directory"])
        ranks = {}
        for rank in range(job["processes"]):
            pid = os.fork()
            if not pid:
                answers.close()
                _run_rank(directory, rank, job["processes"], job["port"])
            ranks[pid] = rank
        print(json.dumps([*ranks]), file=answers, flush=True)
        statuses = [0] * job["processes"]
        while ranks:
            pid, status = os.wait()
            statuses[ranks.pop(pid)] = status
            if status:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
        print(json.dumps(statuses), file=answers, flush=True)


def _run_rank(directory: Path, rank: int, size: int, port: int) -> None:
    """Call AutoModel's CLI as one rank, and exit."""
    status = 1
    try:
        log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(directory)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "recipes",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        sys.argv = ["automodel", str(directory / "recipe.yaml")]
        from nemo_automodel.cli import app

        app.main()
        status = 0
    except BaseException as error:  # exits as well must reach the test
        message = f"rank {rank}: {type(error).__name__}: {error}\n\n{traceback.format_exc()}"
        (directory / f"error_{rank}").write_text(message)
        print(message, file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
