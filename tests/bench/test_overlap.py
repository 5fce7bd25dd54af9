# SPDX-License-Identifier: Apache-2.0
"""How much of slowed collectives overlaps with compute, on a clock that only sleep moves."""

import pytest
import torch

from nemo_dsv4_cp.bench import overlap
from nemo_dsv4_cp.bench.layer import Output
from nemo_dsv4_cp.bench.overlap import Pass, SlowLink
from nemo_dsv4_cp.exchange.collectives import InFlight


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Arrived:
    def wait(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(overlap, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("overlaps", "computing", "seconds"),
    [(True, 5.0, 5.0), (True, 0.5, 2.0), (False, 5.0, 7.0)],
)
def test_a_slow_link_carries_one_collective_after_the_other(clock, overlaps, computing, seconds):
    link = SlowLink(1.0)
    with link.slowing():
        flights = [InFlight(overlap=overlaps) for _ in range(2)]
        for flight in flights:
            flight.begin(Arrived(), "rows")
        clock.sleep(computing)
        assert [flight.end() for flight in flights] == ["rows"] * 2
    assert clock.now == seconds
    assert len(link.waited) == 2
    assert sum(link.waited) == seconds - computing


def test_hidden_is_what_no_rank_waited_for():
    assert Pass("forward", 4, "on", True, 4, 3.0, 3.4, 0.2, 0.2).hidden == pytest.approx(0.75)
    assert Pass("forward", 4, "on", False, 4, 3.0, 3.6, 0.8, 0.2).hidden == pytest.approx(0.0)


def test_a_layer_is_measured_in_both_directions(monkeypatch):
    monkeypatch.setattr(overlap.local_ranks, "run", lambda job, ranks, *a: job(None, 0, *a))
    monkeypatch.setattr(overlap, "barrier", lambda group: None)
    monkeypatch.setattr(overlap, "cp_size", lambda group: 1)
    monkeypatch.setattr(overlap, "SIZES", {"hidden_size": 64, "num_attention_heads": 4})

    def build(case, group, **sizes):
        assert sizes["hidden_size"] == 64
        weight = torch.ones(3, requires_grad=True)
        return lambda: Output(weight * 2)

    monkeypatch.setattr(overlap, "build", build)
    found = overlap.measure(4, "on", seq_len=128, delay=0.1, repeats=1)
    assert [(each.direction, each.overlap) for each in found] == [
        ("forward", True),
        ("backward", True),
        ("forward", False),
        ("backward", False),
    ]
    assert all(each.seconds > 0 and each.collectives == 0 for each in found)
