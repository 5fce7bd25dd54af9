# SPDX-License-Identifier: Apache-2.0
"""Collectives that run while the device computes.

A collective starts as soon as its input exists and is waited for where its output is first read.
Two autograd functions, start and wait, give the same overlap in backward: the backward of wait
starts the reverse collective, the backward of start waits for it. Of the functions that are ready
autograd takes the one whose forward ran last, so whatever ran between start and wait in forward
runs between them in backward.

An empty tensor ties the two together; autograd does not see the memory that a collective fills.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from nemo_dsv4_cp.exchange.collectives import Work

T = TypeVar("T")


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Exclude a function from torch.compile: a collective of ours is a break in its graph."""
    excluded: Callable[..., Any] = torch.compiler.disable(function)
    return excluded


@dataclass(frozen=True)
class Pending(Generic[T]):
    """A result that may not be there yet.

    Attributes:
        wait: Returns the result; called once.
    """

    wait: Callable[[], T]


@dataclass
class InFlight:
    """One collective at a time and the memory that it fills: forward's, later backward's.

    Attributes:
        overlap: Whether the collective may overlap with compute; else :meth:`begin` waits for it.
    """

    overlap: bool
    _work: Work | None = None
    _filling: Any = None

    def begin(self, work: Work, filling: Any) -> None:
        """Take over a collective that was started, and what it fills."""
        self._work, self._filling = work, filling
        if not self.overlap:
            work.wait()
            self._work = None

    def end(self) -> Any:
        """Wait, return what the collective filled, and drop the reference to it."""
        if self._work is not None:
            self._work.wait()
        filled, self._work, self._filling = self._filling, None, None
        return filled
