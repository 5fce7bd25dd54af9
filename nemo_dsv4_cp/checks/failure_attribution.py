# SPDX-License-Identifier: Apache-2.0
"""Failure attribution: when ranks fail, the first line that each prints names the culprit.

A rank that is killed, stops or raises leaves the others waiting in a collective. These then fail
too, maybe first, with "connection closed" or a timeout that names no rank. So every failing rank
writes its error to the store of the job. One that failed in a collective reads there which rank
raised, or which did not answer, before its traceback is printed.

Off by default (``context_parallel.failure_attribution``): it replaces ``sys.excepthook``.
"""

from __future__ import annotations

import sys
import time
import traceback
from types import TracebackType
from typing import Any

from nemo_dsv4_cp.automodel import patches
from nemo_dsv4_cp.exchange.collectives import Store, failed_in_a_collective, store_of_the_job

ANSWER_SECONDS = 10.0
"""How long a rank waits for the others to report that they fail too, before it names them."""

_RAISED = "nemo_dsv4_cp/raised"
_WAITED = "nemo_dsv4_cp/waited"


def install() -> None:
    """Attribute errors that end this process before they are printed; again changes nothing."""
    # torch puts its own on top with every first process group, and calls ours from there.
    if not patches.was_replaced(sys, "excepthook"):
        patches.replace(sys, "excepthook", _attributing(sys.excepthook))


def _attributing(print_traceback: Any) -> Any:
    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        job = store_of_the_job()
        if job is not None and isinstance(error, Exception):
            store, rank, size = job
            try:
                cause = first_failure(error, store, rank=rank, size=size)
            except RuntimeError as lost:  # with the machine that held it
                cause = f"the store of the job does not answer ({lost}); its machine may be down"
            if cause is not None:
                print(f"[rank{rank}]: {cause}", file=sys.stderr, flush=True)
        print_traceback(kind, error, trace)

    return excepthook


def first_failure(
    error: BaseException,
    store: Store,
    *,
    rank: int,
    size: int,
    answer_seconds: float = ANSWER_SECONDS,
) -> str | None:
    """Report through the job's store that this rank fails, and return which rank failed first.

    None if the error is this rank's own, or if all ranks failed in a collective. Other ranks have
    ``answer_seconds`` to report.
    """
    if not failed_in_a_collective(error):
        line = " ".join(traceback.format_exception_only(error)[-1].split())
        store.append(_RAISED, f"rank {rank} raised {line}\n")
        return None
    store.append(_WAITED, f"{rank} ")
    end = time.monotonic() + answer_seconds
    while True:
        if raised := _read(store, _RAISED):
            return f"{raised.splitlines()[0]}, and this rank waited for it in a collective"
        silent = set(range(size)) - {int(waited) for waited in _read(store, _WAITED).split()}
        if not silent:
            return None
        if time.monotonic() > end:
            names = ", ".join(map(str, sorted(silent)))
            return (
                f"rank {names} gave no sign for {answer_seconds:g} s: killed, stopped or hanging, "
                "and this rank waited in a collective"
            )
        time.sleep(0.1)


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
