# SPDX-License-Identifier: Apache-2.0
from nemo_dsv4_cp.bench.timing import describe_machine, time_gloo_ranks


def test_every_path_is_timed_in_turn_on_real_ranks(forked_local_ranks):
    timings = time_gloo_ranks(["automodel", "boundary"], 4, 512, 2, repeats=2)
    assert [timing.case.path for timing in timings] == ["automodel", "boundary"]
    for timing in timings:
        assert len(timing.seconds) == 2
        assert timing.median > 0
    assert "torch" in describe_machine()
