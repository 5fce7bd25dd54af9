"""A job on a few ranks of this machine: GPUs where there are enough, else CPU processes."""

from __future__ import annotations

import importlib
import logging
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessException, spawn

from nemo_dsv4_cp.exchange.collectives import process_group


class RankFailed(RuntimeError):
    """What one rank raised; the others were ended."""


def device_of(rank: int, ranks: int) -> torch.device:
    """Return where a rank computes: its own GPU if every rank has one, else the CPU."""
    return torch.device("cuda", rank) if torch.cuda.device_count() >= ranks else torch.device("cpu")


def run(job: Callable[..., Any], ranks: int, *args: Any) -> Any:
    """Run ``job(group, rank, *args)`` on every rank and return what rank 0 returns.

    Warnings that torch and the host give about themselves are left out.

    Args:
        job: A function of a module, for processes to import.
        ranks: How many processes.
        *args: What the job takes besides; pickled.

    Raises:
        RankFailed: With the traceback of the rank that raised first.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = get_context("spawn").SimpleQueue()
    name = (job.__module__, job.__qualname__)
    processes = spawn(_rank, (ranks, port, name, args, results), nprocs=ranks, join=False)
    try:
        while not processes.join(timeout=0.2) and results.empty():
            pass
        result = results.get()
        while not processes.join():
            pass
    except ProcessException as error:
        raise RankFailed(str(error).strip()) from error
    return result


def _rank(
    rank: int, ranks: int, port: int, name: tuple[str, str], args: tuple[Any, ...], results: Any
) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr  # AutoModel 0.6 prints on import; stdout is for the command's answer
    torch.set_num_threads(1)
    # Imported here, since the host already warns while it is imported.
    job = getattr(importlib.import_module(name[0]), name[1])
    device = device_of(rank, ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with process_group(backend, rank=rank, size=ranks, port=port) as group:
        result = job(group, rank, *args)
        if rank == 0:
            results.put(result)
