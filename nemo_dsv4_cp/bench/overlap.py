# SPDX-License-Identifier: Apache-2.0
"""How much of slowed collectives overlaps with compute, on real gloo ranks.

On one machine a collective takes almost no time. The benchmark therefore delays each by a given
time, as a link would that carries one collective at a time. The time that a rank waits for delayed
collectives did not overlap with compute. It is measured at each wait: a comparison of whole passes
would be less exact, because other processes of the machine change their time by more.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from nemo_dsv4_cp.bench.layer import Case, build
from nemo_dsv4_cp.exchange.collectives import InFlight, Work, all_gather_metadata, barrier, cp_size
from nemo_dsv4_cp.tools import local_ranks
from nemo_dsv4_cp.tools.crossings import BOUNDARY

RANKS = 2
SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "num_attention_heads": 32,
    "head_dim": 128,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 512,
    "o_lora_rank": 128,
    "o_groups": 4,
    "index_n_heads": 64,
    "index_head_dim": 64,
    "index_topk": 64,
    "torch_dtype": "float32",
}
"""Projections about as heavy beside attention as V4-Flash's, at what a CPU core gets through."""


@dataclass(frozen=True)
class Pass:
    """One pass of a layer, as it is and with collectives slowed.

    Attributes:
        collectives: How many it starts.
        seconds: Time of the slowest rank in the fastest repeat; other processes only add to it.
        slowed_seconds: The same with each collective slowed by ``delay`` seconds.
        waited: Seconds that ranks waited for delayed collectives: the longest wait of any rank for
            each collective, summed over the collectives; median of the repeats.
    """

    direction: str
    ratio: int
    balance: str
    overlap: bool
    collectives: int
    seconds: float
    slowed_seconds: float
    waited: float
    delay: float

    @property
    def hidden(self) -> float:
        """Return the share of the added time that no rank waited for."""
        return 1 - self.waited / (self.collectives * self.delay)


class SlowLink:
    """Makes collectives take longer, one after the other.

    Attributes:
        waited: Of each collective, the seconds that this rank waited because it was late.
    """

    def __init__(self, delay: float) -> None:
        """Remember the delay in seconds."""
        self._delay, self._free_at = delay, 0.0
        self.waited: list[float] = []

    @contextmanager
    def slowing(self) -> Iterator[None]:
        """Slow every collective that may overlap with computing."""
        begin = InFlight.begin

        def slowed(flight: InFlight, work: Work, filling: Any) -> None:
            arrival = self._free_at = max(self._free_at, time.perf_counter()) + self._delay
            place = len(self.waited)
            self.waited.append(0.0)

            def wait() -> None:
                work.wait()
                late = max(0.0, arrival - time.perf_counter())
                self.waited[place] += late
                time.sleep(late)

            begin(flight, SimpleNamespace(wait=wait), filling)  # type: ignore[arg-type]

        with mock.patch.object(InFlight, "begin", slowed):
            yield


def measure(ratio: int, balance: str, *, seq_len: int, delay: float, repeats: int) -> list[Pass]:
    """Time a layer's passes with overlap and without, its collectives as they are and slowed.

    On two ranks of one thread each, in turn, after one repeat that does not count.
    """
    passes: list[Pass] = local_ranks.run(_rank, RANKS, ratio, balance, seq_len, delay, repeats)
    return passes


def _rank(
    group: Any, rank: int, ratio: int, balance: str, seq_len: int, delay: float, repeats: int
) -> list[Pass]:
    forwards = {
        overlap: build(
            Case(BOUNDARY, ratio, seq_len, cp_size(group), rank, balance=balance, overlap=overlap),
            group,
            dtype=torch.float32,
            device=torch.device("cpu"),
            **SIZES,
        )
        for overlap in (True, False)
    }
    seconds: dict[tuple[str, bool, float], list[float]] = defaultdict(list)
    waits: dict[tuple[str, bool, float], list[float]] = defaultdict(list)
    counts: dict[str, int] = {}

    def timed(direction: str, overlap: bool, slowed_by: float, run: Any) -> Any:
        link = SlowLink(slowed_by)
        barrier(group)
        begin = time.perf_counter()
        with link.slowing():
            result = run()
        barrier(group)
        seconds[direction, overlap, slowed_by].append(time.perf_counter() - begin)
        waited = all_gather_metadata(torch.tensor([link.waited]), dim=0, cp_group=group)
        waits[direction, overlap, slowed_by].append(float(waited.amax(0).sum()))
        counts[direction] = len(link.waited)
        return result

    for _ in range(repeats + 1):
        for overlap, forward in forwards.items():
            for slowed_by in (0.0, delay):
                out = timed("forward", overlap, slowed_by, forward).hidden_BLE
                grad = torch.ones_like(out)
                timed("backward", overlap, slowed_by, lambda out=out, grad=grad: out.backward(grad))
    return [
        Pass(
            direction,
            ratio,
            balance,
            overlap,
            counts[direction],
            min(seconds[direction, overlap, 0.0][1:]),
            min(seconds[direction, overlap, delay][1:]),
            statistics.median(waits[direction, overlap, delay][1:]),
            delay,
        )
        for overlap in forwards
        for direction in counts
    ]
