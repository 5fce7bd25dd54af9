import pytest

from nemo_dsv4_cp.tools.layer import Case
from nemo_dsv4_cp.tools.weighing import weigh

GIB = 1 << 30
AT_128K = {"seq_len": 131072, "cp_size": 8, "rank": 4}


@pytest.mark.parametrize(("ratio", "received"), [(4, 11584), (128, 1032), (0, 1024)])
def test_the_hosts_traffic_is_what_was_measured_on_it(ratio, received):
    weight = weigh(Case("host", ratio, **AT_128K))
    assert weight.per_token(weight.received_forward) == pytest.approx(received, abs=0.5)


@pytest.mark.parametrize(("ratio", "at_most"), [(4, 330), (128, 10), (0, 2)])
def test_boundary_receives_no_more_than_attention_needs(ratio, at_most):
    # Bytes do not go by the size of a chunk, and large chunks are weighed sooner.
    weight = weigh(Case("boundary", ratio, **AT_128K, workspace_mib=1 << 14))
    entries = {4: 256 + 64, 128: 8, 0: 0}[ratio]
    assert entries < weight.per_token(weight.received_forward) <= at_most
    # Backward mirrors forward but for the index keys, which need no gradient.
    assert weight.per_token(weight.received_backward) <= at_most - (64 if ratio == 4 else 0)


@pytest.mark.parametrize("ratio", [0, 128])
def test_memory_grows_by_the_entries_alone_when_length_and_ranks_double(ratio):
    small, large = (
        weigh(Case("boundary", ratio, 4096 * size, size, size - 1)) for size in (64, 128)
    )
    entries = 64 * 4096 // ratio if ratio else 0
    # Each new entry is held in bfloat16 as it arrives and in order, its gradient in float32.
    assert large.peak_bytes - small.peak_bytes <= entries * 512 * (2 + 2 + 4) + (1 << 20)


def test_what_is_saved_for_backward_is_queries_keys_and_little_else():
    weight = weigh(Case("boundary", 0, 131072, 8, 7))
    per_head = 16384 * 64 * 512 * 2  # queries before the norm, after it, and the output
    assert 3 * per_head <= weight.saved_bytes <= 4 * per_head
    assert len(weight.largest) == 5
    assert weight.largest[0].bytes == per_head
