# SPDX-License-Identifier: Apache-2.0
"""A job on a few ranks of this machine: GPUs where there are enough, else CPU processes."""

from __future__ import annotations

import faulthandler
import importlib
import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

from nemo_dsv4_cp.exchange.collectives import process_group


class RankFailed(RuntimeError):
    """A rank failed, and the others were ended: the first one, its error in a line, the log."""

    def __init__(self, rank: int, error: str, log: Path) -> None:
        super().__init__(f"rank {rank} failed: {error} (log: {log})")
        self.rank, self.error, self.log = rank, error, log


def device_of(rank: int, ranks: int) -> torch.device:
    """Return where a rank computes: its own GPU if every rank has one, else the CPU."""
    return torch.device("cuda", rank) if torch.cuda.device_count() >= ranks else torch.device("cpu")


def run(job: Callable[..., Any], ranks: int, *args: Any) -> Any:
    """Run ``job(group, rank, *args)`` on every rank and return what rank 0 returns.

    What the ranks write goes to a log file, which stays if one fails. Warnings of torch and
    AutoModel are left out.

    Args:
        job: A function of a module, which the processes import.
        ranks: How many processes.
        *args: Its other arguments; pickled.

    Raises:
        RankFailed: If a rank raised, or ended silently.
    """
    descriptor, file = tempfile.mkstemp(prefix="nemo-dsv4-cp-", suffix=".log")
    os.close(descriptor)
    log = Path(file)
    # One queue of (rank, result, error): the first failure comes before those that follow from it.
    answers = get_context("spawn").SimpleQueue()
    name = (job.__module__, job.__qualname__)
    # As bytes: what arguments import, with its warnings, comes after the log is there.
    packed = pickle.dumps(args)
    with _reserved_port() as port:
        started = spawn(_rank, (ranks, port, name, packed, log, answers), nprocs=ranks, join=False)
        try:
            result = _collect(started.processes, answers, log)
        except RankFailed:
            raise
        except BaseException:
            log.unlink()
            raise
        finally:
            for process in started.processes:
                process.kill()  # it may wait for the one that failed
                process.join()
    log.unlink()
    return result


@contextmanager
def _reserved_port() -> Iterator[int]:
    """Bind a port that the system picks, so that no other process gets it, without listening.

    Rank 0's store can still listen on it, since both sockets set SO_REUSEADDR.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def _collect(processes: Sequence[Any], answers: Any, log: Path) -> Any:
    """Return rank 0's result when every rank has answered and ended."""
    results: dict[int, Any] = {}
    while len(results) < len(processes):
        # Read before the queue is: a process that has ended by now has sent all that it will.
        ended = {rank: process.exitcode for rank, process in enumerate(processes)}
        killed = [rank for rank, status in ended.items() if status is not None and status < 0]
        silent = [rank for rank, status in ended.items() if status and rank not in results]
        if killed or (silent and answers.empty()):
            rank = (killed or silent)[0]
            status = ended[rank]
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            raise RankFailed(rank, f"its process ended with {how}", log)
        if answers.empty():
            time.sleep(0.1)
            continue
        rank, result, failure = answers.get()
        if failure is not None:
            raise RankFailed(rank, failure, log)
        results[rank] = result
    for process in processes:
        process.join()
    return results[0]


def _rank(
    rank: int, ranks: int, port: int, name: tuple[str, str], packed: bytes, log: Path, answers: Any
) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with ExitStack() as stack:  # the error is sent before the group's end makes others fail
        try:
            # Imported here, since AutoModel already warns while it is imported.
            job = getattr(importlib.import_module(name[0]), name[1])
            device = device_of(rank, ranks)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            backend = "nccl" if device.type == "cuda" else "gloo"
            group = stack.enter_context(process_group(backend, rank=rank, size=ranks, port=port))
            result = job(group, rank, *pickle.loads(packed))
            answers.put((rank, result if rank == 0 else None, None))
        except Exception as error:
            print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            line = traceback.format_exception_only(error)[-1].splitlines()[0]
            answers.put((rank, None, line))
