# SPDX-License-Identifier: Apache-2.0
"""Collectives that are under way while the device computes.

A collective starts as soon as its input exists and is waited for where its output is first read.
Two autograd functions make it so in backward too: the start's gradient is what the wait's backward
has begun to fetch, and whatever backward autograd runs between the two hides it. Of the functions
that are ready autograd takes the one whose forward ran last, so what lay between start and wait in
forward lies between them in backward.

An empty tensor ties the two together. What is on its way stays out of autograd's sight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from nemo_dsv4_cp.exchange.collectives import Work

T = TypeVar("T")


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a compiler out of a function: a collective of ours is a break in its graph."""
    kept_out: Callable[..., Any] = torch.compiler.disable(function)
    return kept_out


class InFlight:
    """One collective at a time and the memory that it fills: forward's, later backward's."""

    def __init__(self, *, overlap: bool) -> None:
        """Wait at once, unless collectives may overlap with what is computed."""
        self._overlap = overlap
        self._work: Work | None = None
        self._filling: Any = None

    def begin(self, work: Work, filling: Any) -> None:
        """Take over a collective that was started, and what it fills."""
        self._work, self._filling = work, filling
        if not self._overlap:
            self._arrive()

    def end(self) -> Any:
        """Return what was being filled once it is, and let go of it."""
        self._arrive()
        filled, self._filling = self._filling, None
        return filled

    def _arrive(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None


class Pending(Generic[T]):
    """A result that may be on its way."""

    def __init__(self, wait: Callable[[], T]) -> None:
        """Remember what returns the result; it is called once."""
        self.wait = wait
