# SPDX-License-Identifier: Apache-2.0
"""A pool of worker processes that stay alive for the whole test run, joined by gloo.

Importing AutoModel takes seconds, so one server does it and the workers are its forks. A job is a
module-level function ``job(group, rank, *args)`` that runs on the first n workers; what it returns
comes back in rank order, and the first error any rank raises is raised here, at once. That a rank
waits for others is no error: on a loaded machine they may take minutes.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.util import get_temp_dir
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import start_processes

WORLD = 8
TIMEOUT = timedelta(minutes=15)

FORKS = mp.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.packed_parity"])
get_temp_dir()  # of the server's socket, whose path must be short: before tests change tempfile's

fork_ranks = partial(start_processes, start_method="forkserver")
"""Takes the place of ``spawn`` in ``tools.local_ranks``: ranks that need not import AutoModel."""


def _serve(rank: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # AutoModel compiles anew for every length
    dist.init_process_group(
        "gloo",
        store=dist.TCPStore("127.0.0.1", port, timeout=TIMEOUT),
        rank=rank,
        world_size=WORLD,
        timeout=TIMEOUT,
    )
    groups = {n: dist.new_group(range(n), timeout=TIMEOUT) for n in range(1, WORLD + 1)}
    while (message := pipe.recv()) is not None:
        job, count, args = message
        try:
            pipe.send((True, job(groups[count], rank, *args)))
        except BaseException:  # every kind of failure must reach the test
            pipe.send((False, f"rank {rank} of {count}:\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class RankError(AssertionError):
    """What a rank raised, with its traceback."""


class RankPool:
    def __init__(self) -> None:
        self._processes: list[mp.Process] = []
        self._pipes: list[Connection] = []
        self._store: dist.TCPStore | None = None

    def _start(self) -> None:
        # This process keeps the store, on a port that the system picks: nobody can take it between.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(WORLD):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(
                target=_serve, args=(rank, self._store.port, theirs), daemon=True
            )
            process.start()
            theirs.close()  # so that a worker that dies leaves its pipe at an end
            self._processes.append(process)
            self._pipes.append(ours)

    def run(
        self,
        job: Callable[..., Any],
        ranks: int,
        *args: Any,
        within: float = 2 * TIMEOUT.total_seconds(),
    ) -> list[Any]:
        """Run ``job`` on ``ranks`` workers and return what each returned.

        Ranks that do not answer ``within`` these seconds hang, and are ended.
        """
        if not self._processes:
            self._start()
        pipes = self._pipes[:ranks]
        for pipe in pipes:
            pipe.send((job, ranks, args))
        answers: dict[Connection, Any] = {}
        while len(answers) < ranks:
            ready = wait([p for p in pipes if p not in answers], timeout=within)
            if not ready:
                self.stop()
                raise RankError(f"{len(answers)} of {ranks} ranks answered in {within:g} s")
            for pipe in ready:
                try:
                    worked, answers[pipe] = pipe.recv()
                except EOFError:
                    worked, answers[pipe] = False, f"rank {pipes.index(pipe)} of {ranks} died"
                if not worked:  # the others may wait for it in a collective
                    error = answers[pipe]
                    self.stop()
                    raise RankError(error)
        return [answers[pipe] for pipe in pipes]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes, self._store = [], [], None
