# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nemo_dsv4_cp.bench.layer import Case, build
from nemo_dsv4_cp.bench.timing import CPU_SIZES, describe_machine, time_gloo_ranks
from nemo_dsv4_cp.exchange.collectives import lone_last_rank


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


@pytest.mark.parametrize("ratio", [0, 4])
def test_the_last_rank_computes_without_the_others(ratio):
    case = Case("boundary", ratio, 1024, 2, 1, kernels="torch")
    with lone_last_rank(2) as group:
        forward = build(case, group, dtype=torch.float32, device=torch.device("cpu"), **CPU_SIZES)
        out = forward().hidden_BLE
        out.backward(torch.ones_like(out))
    assert out.shape[1] == 512


def test_the_last_rank_of_v41_computes_without_the_others():
    layer_v41 = pytest.importorskip("nemo_dsv4_cp.bench.layer_v41")
    with lone_last_rank(8) as group:
        for case in layer_v41.cases(["boundary"], [2, 24], 128, 8, 7, kernels="torch"):
            forward = layer_v41.build(case, group, dtype=torch.bfloat16, device=torch.device("cpu"))
            out = forward().hidden_BLE
            out.backward(torch.ones_like(out))
