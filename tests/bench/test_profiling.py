# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nemo_dsv4_cp.bench.layer import Case
from nemo_dsv4_cp.bench.profiling import Launches, Profiler, profile
from nemo_dsv4_cp.kernels.costs import Cost, register_cost

GIB = 1 << 30
AT_128K = {"seq_len": 131072, "cp_size": 8, "rank": 4}


@pytest.mark.parametrize(("ratio", "received"), [(4, 11584), (128, 1032), (0, 1024)])
def test_automodels_traffic_is_what_was_measured_on_it(ratio, received):
    found = profile(Case("automodel", ratio, **AT_128K))
    assert found.per_token(found.received_forward) == pytest.approx(received, abs=0.5)


@pytest.mark.parametrize(("ratio", "at_most"), [(4, 330), (128, 10), (0, 2)])
def test_boundary_receives_no_more_than_attention_needs(ratio, at_most):
    # Bytes received are the same with any kernels, and Triton's are few.
    options = {"kernels": "triton", "balance": "off"}
    found = profile(Case("boundary", ratio, **AT_128K, **options))
    entries = {4: 256 + 64, 128: 8, 0: 0}[ratio]
    assert entries < found.per_token(found.received_forward) <= at_most
    # Backward mirrors forward but for the index keys, which need no gradient.
    assert found.per_token(found.received_backward) <= at_most - (64 if ratio == 4 else 0)


@pytest.mark.parametrize("ratio", [0, 128])
@pytest.mark.parametrize("kernels", ["triton", pytest.param("torch", marks=pytest.mark.slow)])
def test_memory_grows_by_the_entries_alone_when_length_and_ranks_double(kernels, ratio):
    options = {"kernels": kernels, "balance": "off"}
    small, large = (
        profile(Case("boundary", ratio, 4096 * size, size, size - 1, **options))
        for size in (64, 128)
    )
    entries = 64 * 4096 // ratio if ratio else 0
    # Each new entry is held in bfloat16 as it arrives and in order, its gradient in float32.
    assert large.peak_bytes - small.peak_bytes <= entries * 512 * (2 + 2 + 4) + (1 << 20)


def test_what_is_saved_for_backward_is_queries_keys_and_little_else():
    found = profile(Case("boundary", 0, 131072, 8, 7))
    per_head = 16384 * 64 * 512 * 2  # queries before the norm, after it, and the output
    assert 3 * per_head <= found.saved_bytes <= 4 * per_head
    assert len(found.largest) == 5
    assert found.largest[0].bytes == per_head


@pytest.mark.parametrize(
    ("ratio", "launches", "gb"), [(0, 91, 101), (4, 246, 157), (128, 147, 114)]
)
def test_automodels_launches_are_what_was_counted_on_it(ratio, launches, gb):
    forward = profile(Case("automodel", ratio, 131072, 8, 7)).forward
    assert forward.count == pytest.approx(launches, rel=0.1)
    assert forward.moved_bytes == pytest.approx(gb * 1e9, rel=0.1)


LIMITS = {  # ratio, ranks: launches forward and backward, GB forward and backward
    (0, 8): (100, 140, 14, 40),
    (128, 8): (120, 170, 15, 41),
    (4, 8): (250, 250, 24, 45),
    (4, 64): (450, 250, 60, 60),
}


def by_triton(ratio, ranks, balance):
    size = {"seq_len": 16384 * ranks, "cp_size": ranks, "rank": ranks - 1}
    return profile(Case("boundary", ratio, **size, kernels="triton", balance=balance))


@pytest.mark.parametrize("balance", ["on", "off"])
@pytest.mark.parametrize(("ratio", "ranks"), LIMITS)
def test_triton_launches_few_operations_that_touch_little(ratio, ranks, balance):
    found = by_triton(ratio, ranks, balance)
    forward, backward, gb_forward, gb_backward = LIMITS[ratio, ranks]
    assert found.forward.count <= forward
    assert found.backward.count <= backward
    assert found.forward.moved_bytes <= gb_forward * 1e9
    assert found.backward.moved_bytes <= gb_backward * 1e9
    assert found.peak_bytes <= 7 * GIB


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("kernels", ["triton", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_remote_query_moves_little(kernels, ratio):
    on, off = (
        profile(Case("boundary", ratio, 16384, 2, 0, kernels=kernels, balance=balance))
        for balance in ("on", "off")
    )
    tokens = 8192 // 2
    assert (on.received_forward - off.received_forward) / tokens <= 12 << 10
    assert on.received_backward - off.received_backward <= tokens * (12 << 10)
    assert on.peak_bytes <= off.peak_bytes + GIB


@pytest.mark.parametrize(("ratio", "at_most"), [(0, 250), (4, 1250), (128, 400)])
def test_the_torch_path_launches_hundreds_of_operations_on_a_gpu(ratio, at_most):
    found = profile(Case("boundary", ratio, 131072, 8, 7, kernels="torch", balance="off"))
    assert found.forward.count <= at_most
    assert found.backward.count <= 1250
    # What an H100's workspace adds to the layer's own memory.
    assert found.peak_bytes <= 6 * GIB + (2560 << 20)


def launched(run):
    with Profiler(Case("automodel", 0, 256, 2, 0)) as profiler:
        run()
    return profiler.launched


def test_an_operation_reads_and_writes_the_tensors_it_sees():
    x = torch.zeros(8, 4)
    assert launched(lambda: x + 1) == Launches(1, 128, 128)
    assert launched(lambda: x.add_(1)) == Launches(1, 128, 128)
    assert launched(lambda: x.copy_(torch.empty(8, 4))) == Launches(1, 128, 128)
    assert launched(lambda: x[:2] + 1) == Launches(1, 32, 32)
    assert launched(lambda: x[:1].expand(8, 4) + 1) == Launches(1, 16, 128)


def test_views_and_allocations_launch_nothing():
    x = torch.zeros(8, 4)
    assert launched(lambda: (x[1:].t(), torch.empty(3), x.view(-1).detach())) == Launches()
    assert launched(lambda: torch.empty(0, 4) + 1) == Launches()


@torch.library.custom_op("dsv4_cp_tests::costly", mutates_args=())
def costly(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def test_what_an_operation_registers_is_counted_and_its_scratch_is_in_the_peak():
    register_cost("dsv4_cp_tests::costly")(lambda x: Cost(7, 11, 13, scratch_bytes=1000))
    with Profiler(Case("automodel", 0, 256, 2, 0)) as profiler:
        out = costly(torch.zeros(8, 4))
    assert profiler.launched - launched(lambda: torch.zeros(8, 4)) == Launches(7, 11, 13)
    assert profiler.peak == 128 + out.nbytes + 1000
