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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

from nemo_dsv4_cp.exchange.collectives import process_group


class RankFailed(RuntimeError):
    """A rank failed, and the others were ended.

    Attributes:
        rank: Which one; the first, if several did.
        error: What of, in a line.
        log: The file with all that the ranks wrote, tracebacks among it.
    """

    def __init__(self, rank: int, error: str, log: Path) -> None:
        super().__init__(f"rank {rank} failed: {error} (log: {log})")
        self.rank, self.error, self.log = rank, error, log


@dataclass(frozen=True)
class _Answer:
    """What a rank tells at its end: the job's result, or what it failed of."""

    rank: int
    result: Any = None
    error: str | None = None


def device_of(rank: int, ranks: int) -> torch.device:
    """Return where a rank computes: its own GPU if every rank has one, else the CPU."""
    return torch.device("cuda", rank) if torch.cuda.device_count() >= ranks else torch.device("cpu")


def run(job: Callable[..., Any], ranks: int, *args: Any) -> Any:
    """Run ``job(group, rank, *args)`` on every rank and return what rank 0 returns.

    What the ranks write goes to a log file, which stays if one fails. Warnings that torch and the
    AutoModel give about themselves are left out.

    Args:
        job: A function of a module, for processes to import.
        ranks: How many processes.
        *args: What the job takes besides; pickled.

    Raises:
        RankFailed: If a rank raised, or ended without a word.
    """
    descriptor, file = tempfile.mkstemp(prefix="nemo-dsv4-cp-", suffix=".log")
    os.close(descriptor)
    log = Path(file)
    # One queue for all: the first failure comes first, and those that follow from it later.
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
    """Bind a port that the system picks, and keep it bound but not listening.

    The system gives a bound port to no other process. Rank 0's store can still listen on it, since
    both sockets set SO_REUSEADDR and this one does not listen.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def _collect(processes: Sequence[Any], answers: Any, log: Path) -> Any:
    """Return rank 0's result when every rank has told and ended."""
    results: dict[int, Any] = {}
    while len(results) < len(processes):
        # Asked before the queue is: whoever has ended by now has told all that it will.
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
        answer: _Answer = answers.get()
        if answer.error is not None:
            raise RankFailed(answer.rank, answer.error, log)
        results[answer.rank] = answer.result
    for process in processes:
        process.join()
    return results[0]


def _rank(
    rank: int,
    ranks: int,
    port: int,
    name: tuple[str, str],
    packed: bytes,
    log: Path,
    answers: Any,
) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with ExitStack() as stack:  # the error is told before the group's end makes others fail
        try:
            # Imported here, since AutoModel already warns while it is imported.
            job = getattr(importlib.import_module(name[0]), name[1])
            device = device_of(rank, ranks)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            backend = "nccl" if device.type == "cuda" else "gloo"
            group = stack.enter_context(process_group(backend, rank=rank, size=ranks, port=port))
            result = job(group, rank, *pickle.loads(packed))
            answer = _Answer(rank, result if rank == 0 else None)
        except Exception as error:
            print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            line = traceback.format_exception_only(error)[-1].splitlines()[0]
            answer = _Answer(rank, error=line)
        answers.put(answer)
