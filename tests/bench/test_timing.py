# SPDX-License-Identifier: Apache-2.0
import pytest

from nemo_dsv4_cp.bench.layer import Case
from nemo_dsv4_cp.bench.timing import describe_machine, time_gloo_ranks


def test_every_path_is_timed_in_turn_on_real_ranks(forked_local_ranks):
    cases = [Case(path, 4, 512, 2, 1) for path in ("automodel", "boundary")]
    timings = time_gloo_ranks(cases, repeats=2)
    assert [timing.case.path for timing in timings] == ["automodel", "boundary"]
    for timing in timings:
        assert len(timing.seconds) == 2
        assert timing.median > 0
    assert "torch" in describe_machine()


@pytest.mark.parametrize("layer", [20, pytest.param(24, marks=pytest.mark.slow)])
def test_layers_of_v41_are_timed_too(layer, forked_local_ranks):
    pytest.importorskip("nemo_automodel.components.models.deepseek_v41")
    from nemo_dsv4_cp.bench.layer_v41 import cases

    timings = time_gloo_ranks(cases(["automodel", "boundary"], [layer], 512, 2, 1), repeats=1)
    assert [timing.case.path for timing in timings] == ["automodel", "boundary"]
    assert all(timing.median > 0 for timing in timings)
