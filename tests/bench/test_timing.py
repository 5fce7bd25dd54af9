# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nemo_dsv4_cp.bench.layer import Case, build
from nemo_dsv4_cp.bench.timing import (
    CPU_SIZES,
    describe_machine,
    time_gloo_ranks,
)
from nemo_dsv4_cp.exchange.collectives import lone_last_rank


def test_every_path_is_timed_in_turn_on_real_ranks(forked_local_ranks):
    cases = [Case(path, 4, 512, 2, 1) for path in ("automodel", "boundary")]
    timings = time_gloo_ranks(cases, repeats=2)
    assert [timing.case.path for timing in timings] == ["automodel", "boundary"]
    for timing in timings:
        assert len(timing.seconds) == 2
        assert timing.median > 0
    assert "torch" in describe_machine()


both