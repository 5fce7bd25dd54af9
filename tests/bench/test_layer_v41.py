# SPDX-License-Identifier: Apache-2.0
"""What layers of V4.1-Flash cost a rank: the limits that 1M tokens on 64 ranks must keep."""

from functools import cache

import pytest
import torch

from nemo_dsv4_cp import DeepseekV41ContextParallelConfig
from nemo_dsv4_cp.attention.layer_v41 import SharedState
from nemo_dsv4_cp.bench.layer_v41 import cases
from nemo_dsv4_cp.bench.profiling import Profiler, count_flops, fake_rank, profile
from nemo_dsv4_cp.exchange.collectives import all_gather_metadata
from nemo_dsv4_cp.kernels.reference.cache_formats import MXFP4
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.schedule import SelectionCost

GIB = 1 << 30
AT_1M = (1 << 20, 64, 63)
KINDS = {  # layer: how many of the 40 are alike
    0: 2,  # window alone
    2: 3,  # source of ratio 2
    3: 15,  # reuses what was selected
    20: 1,  # source of ratio 1, which chooses candidates
    24: 4,  # selects inside the candidates
    25: 15,  # reuses what was selected
}


SELECT_AMONG_ALL = {2, 20}


@cache
def profiled(layer, path="boundary", at=AT_1M, kernels="triton", balance="off"):
    (case,) = cases([path], [layer], *at, kernels=kernels, balance=balance)
    return profile(case)


def received_by_batch():
    """The bytes of Engram's token ids and of document numbers, once per step."""
    (case,) = cases(["boundary"], [0], *AT_1M)
    length = case.layout.local_len
    with fake_rank(case) as group, Profiler(case) as profiler:
        options = ContextParallelOptions()
        state = SharedState.start(length, options, group=group, documents_BL=None, alignment=2)
        documents = torch.zeros(1, length, dtype=torch.int32)
        all_gather_metadata(documents, dim=1, cp_group=group)
        ids, real = torch.zeros(1, length, dtype=torch.long), documents.bool()
        state.step.with_halo({"ids": ids, "real": real, "documents": documents}, 3)
        return profiler.received


@pytest.mark.parametrize("layer", KINDS)
def test_no_layer_at_a_million_tokens_takes_more_than_11_gib(layer):
    assert profiled(layer).peak_bytes <= 11 * GIB
    if layer in SELECT_AMONG_ALL:
        assert profiled(layer, balance="auto").peak_bytes <= 11 * GIB


@pytest.mark.slow  # scores of a source take thousands of chunks
@pytest.mark.parametrize(("layer", "at_most"), [(2, 9.1), (24, 10.1)])
def test_nor_much_more_with_torch_kernels(layer, at_most):
    assert profiled(layer, kernels="torch").peak_bytes <= at_most * GIB


def test_the_state_that_layers_carry_takes_no_more_than_1_6_gib():
    carried = profiled(20).carried_bytes
    assert carried == profiled(24).carried_bytes == profiled(25).carried_bytes
    assert carried <= 1.6 * GIB
    entries, local = 1 << 20, 16384
    assert carried == entries * (512 + 128) * 2 + local * (512 + 2048) * 4


def test_a_step_receives_no_more_than_1000_bytes_per_token_and_remote_rank():
    assert sum(KINDS.values()) == 40
    received = sum(number * profiled(layer).received_forward for layer, number in KINDS.items())
    received += received_by_batch()
    per_token = received / 16384 / 63
    quantized = 3 * (288 + 68) / 2 + (288 + 68)  # NVFP4 entries and MXFP4 index keys
    halos = 40 * 127 * 1024 / 16384 / 63
    assert per_token == pytest.approx(quantized + halos + 4, abs=0.1)  # and document numbers
    assert per_token <= 1000


@pytest.mark.parametrize("layer", KINDS)
def test_balance_moves_what_its_cost_says(layer):
    config = DeepseekV41ContextParallelConfig().text_config
    cost = SelectionCost.of(
        config,
        head_bytes=MXFP4.bytes_of(config.index_head_dim),
        chooses_candidates=layer == config.candidate_source_layer_id,
    )
    off, on = profiled(layer), profiled(layer, balance="on")
    moved = 8192 if layer in SELECT_AMONG_ALL else 0
    assert on.received_forward - off.received_forward == moved * cost.sent_forward
    assert on.received_backward - off.received_backward == moved * cost.sent_backward == 0
    if moved:
        assert profiled(layer, balance="auto").received_forward == on.received_forward


@pytest.mark.parametrize("layer", sorted(SELECT_AMONG_ALL))
def test_balanced_ranks_compute_about_as_much(layer):
    def computed(rank, balance):
        options = {"kernels": "triton", "balance": balance}
        (case,) = cases(["boundary"], [layer], 131072, 8, rank, **options)
        forward, _ = count_flops(case)
        return forward

    first, last = (computed(rank, "off") for rank in (0, 7))
    assert last > 1.5 * first
    balanced = [computed(rank, "on") for rank in (0, 7)]
    assert max(balanced) < 1.001 * min(balanced)
    assert balanced[0] == pytest.approx((first + last) / 2, rel=0.001)


@pytest.mark.parametrize(("layer", "received"), [(0, 1025), (2, 1665.5), (20, 2306), (24, 1025)])
def test_automodels_traffic_is_that_of_whole_sequences(layer, received):
    found = profiled(layer, "automodel", (131072, 8, 7))
    assert found.per_token(found.received_forward) == pytest.approx(received, abs=0.5)


def test_automodels_state_grows_with_the_square_of_the_row():
    candidates = 16384 << 20  # bool [local tokens, entries]
    found = profiled(24, "automodel")
    assert candidates < found.carried_bytes < candidates + 2 * GIB
    assert found.peak_bytes > 90 * GIB


@pytest.mark.parametrize(
    ("layers", "seq_len", "message"),
    [([40], 4096, "layer 40 is none of V4.1-Flash's; use 0 to 39"), ([2], 4098, "use 4100")],
)
def test_what_v41_has_not_is_named(layers, seq_len, message):
    with pytest.raises(ValueError, match=message):
        cases(["boundary"], layers, seq_len, 2, 1)
