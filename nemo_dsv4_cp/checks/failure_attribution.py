# SPDX-License-Identifier: Apache-2.0
"""When a rank fails: whose fault it was, in the first line that is printed.

A rank that is killed, stops or raises leaves the others waiting in a collective. These fail of it
too, maybe first, with "connection closed" or a timeout that names no rank. So every rank tells the
store of the job that it fails, and of what. One that failed in a collective looks there who raised,
or who did not answer, before its traceback is printed.
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
"""How long the others have to tell that they fail too; they wait for the same rank as long."""

_RAISED = "nemo_dsv4_cp/raised"
_WAITED = "nemo_dsv4_cp/waited"


def install() -> None:
    """Have errors that end this process looked at before they are printed; again does nothing."""
    # torch puts its own on top with every first process group, and calls ours from there.
    if not patches.was_replaced(sys, "excepthook"):
        patches.replace(sys, "excepthook", _calling_the_roll(sys.excepthook))


def _calling_the_roll(print_traceback: Any) -> Any:
    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        job = store_of_the_job()
        if job is not None and isinstance(error, Exception):
            store, rank, size = job
            try:
                said = whose_fault(error, store, rank=rank, size=size)
            except RuntimeError as lost:  # with the machine that held it
                said = f"the store of the job does not answer ({lost}); its machine may be down"
            if said is not None:
                print(f"[rank{rank}]: {said}", file=sys.stderr, flush=True)
        print_traceback(kind, error, trace)

    return excepthook


def whose_fault(
    error: BaseException,
    store: Store,
    *,
    rank: int,
    size: int,
    answer_seconds: float = ANSWER_SECONDS,
) -> str | None:
    """Tell the others that this rank fails, and find out which rank failed first.

    Args:
        error: What this rank fails of.
        store: Shared by all ranks.
        rank: This rank.
        size: How many ranks there are.
        answer_seconds: How long to wait for other ranks.

    Returns:
        The rank and what happened to it; None if the error is this rank's own, or if all ranks
        failed in a collective.
    """
    if not failed_in_a_collective(error):
        line = " ".join(traceback.format_exception_only(error)[-1].split())
        store.append(_RAISED, f"rank {rank} raised {line}\n")
        return None
    store.append(_WAITED, f"{rank} ")
    end = time.monotonic() + answer_seconds
    while True:
        if raised := _told(store, _RAISED):
            return f"{raised.splitlines()[0]}, and this rank waited for it in a collective"
        silent = set(range(size)) - {int(told) for told in _told(store, _WAITED).split()}
        if not silent:
            return None
        if time.monotonic() > end:
            names = ", ".join(map(str, sorted(silent)))
            return (
                f"rank {names} gave no sign for {answer_seconds:g} s: killed, stopped or hanging, "
                "and this rank waited in a collective"
            )
        time.sleep(0.1)


def _told(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
