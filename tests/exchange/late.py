# SPDX-License-Identifier: Apache-2.0
"""Collectives as slow as they may be: memory arrives at the wait, and nothing before it.

Over gloo a collective is often done before anything reads what it fills, so a wait that is missing
shows in no result. Here what is filled holds NaN until the wait, and what is sent is read when the
collective starts or, as late as NCCL may, at the wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from nemo_dsv4_cp.exchange import collectives


class Late:
    """The work of a collective that has been started; ``wait`` lets its memory arrive."""

    def __init__(self, filled: torch.Tensor, arrive: Callable[[], torch.Tensor]) -> None:
        self._filled, self._arrive = filled, arrive
        self.waits = 0
        filled.fill_(math.nan if filled.is_floating_point() else 255)  # bytes of NaN

    def wait(self) -> None:
        self.waits += 1
        if self.waits == 1:
            self._filled.copy_(self._arrive())


@contextmanager
def late_collectives(reads: str) -> Iterator[list[Late]]:
    """Make collectives late; yield those that were started.

    ``reads`` is ``"start"`` or ``"wait"``: when they read what they send. With the latter, ranks
    must wait for collectives in one order.
    """
    started: list[Late] = []

    def late(collective: Callable[..., Any]) -> Callable[..., Any]:
        def start(
            filled: torch.Tensor, sent: torch.Tensor, *, async_op: bool, **options: Any
        ) -> Late:
            assert async_op
            arriving = torch.empty_like(filled)
            early = None
            if reads == "start":
                early = collective(arriving, sent, async_op=True, **options)

            def arrive() -> torch.Tensor:
                work = early or collective(arriving, sent, async_op=True, **options)
                work.wait()
                return arriving

            started.append(Late(filled, arrive))
            return started[-1]

        return start

    with (
        mock.patch.multiple(
            collectives,
            all_gather_single=late(collectives.all_gather_single),
            reduce_scatter_single=late(collectives.reduce_scatter_single),
        ),
        mock.patch.object(
            collectives.dist, "all_to_all_single", late(collectives.dist.all_to_all_single)
        ),
    ):
        yield started


def late_job(group, rank, job, reads, *arguments):
    """Run a job over late collectives, each of which must be waited for once."""
    with late_collectives(reads) as started:
        found = job(group, rank, *arguments)
    assert started
    assert [work.waits for work in started] == [1] * len(started)
    return found
