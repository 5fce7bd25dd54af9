# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds against queries and tokens counted one by one, and against the layer's own."""

import dataclasses

import pytest

from nemo_dsv4_cp.bench.layer import Case
from nemo_dsv4_cp.bench.profiling import count_flops
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.schedule import QueryCost, balanced, contiguous
from nemo_dsv4_cp.tools.inventory import (
    Operation,
    Shape,
    query_operations,
    shard_operations,
    work_of_ranks,
)
from nemo_dsv4_cp.tools.layers import Layer
from nemo_dsv4_cp.tools.sizes import ModelSizes, read_model_fields

FLASH = ModelSizes.of_fields(read_model_fields("v4_flash"))
# No two sizes alike, so that none can stand for another.
ODD = dataclasses.replace(
    FLASH,
    compress_ratios=(0, 4, 128, 4),
    num_hidden_layers=4,
    hidden_size=37,
    num_attention_heads=3,
    head_dim=5,
    q_lora_rank=7,
    o_lora_rank=11,
    o_groups=13,
    index_n_heads=17,
    index_head_dim=19,
    index_topk=23,
    sliding_window=29,
    moe_intermediate_size=31,
    num_experts_per_tok=2,
    n_shared_experts=1,
    vocab_size=41,
)
LAYOUT = SequenceLayout(256, 0, 4)


def counts(operations):
    """Multiply-adds in forward and backward, by what is multiplied."""
    return {operation.name: (operation.forward, operation.backward) for operation in operations}


def twice_in_backward(multiply_adds):
    return multiply_adds, 2 * multiply_adds


def by_hand(ratio, positions):
    """The work of queries one after another: 3 heads of 5, window 29, top-k 23 of 17 x 19."""
    projection = index_projection = scored = product = output = 0
    for position in positions:
        keys = min(position + 1, 29)
        entries = (position + 1) // ratio if ratio else 0
        product += 3 * 5 * (keys + (min(entries, 23) if ratio == 4 else entries))
        projection += 7 * 3 * 5
        output += 3 * 5 * 11 + 13 * 11 * 37
        if ratio == 4:
            index_projection += 7 * 17 * 19
            scored += entries * 17 * 19
    found = {
        "wq_b": twice_in_backward(projection),
        "attention": (2 * product, 5 * product),
        "wo_a and wo_b": twice_in_backward(output),
    }
    if ratio == 4:
        found |= {"indexer.wq_b": (index_projection, 0), "index scores": (scored, 0)}
    return found


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("shared", [False, True])
def test_queries_are_counted_where_they_are_computed(ratio, shared):
    schedule = balanced(LAYOUT) if shared else contiguous(LAYOUT)
    for local, remote in zip(schedule.local, schedule.remote, strict=True):
        for runs in (local, remote):
            positions = [i for run in runs for i in run]
            assert counts(query_operations(ODD, Layer.v4(ratio), runs)) == by_hand(ratio, positions)
        assert sum(map(len, remote)) == (128 if shared else 0)


@pytest.mark.parametrize(("ratio", "features"), [(0, 0), (4, 4), (128, 2)])
def test_a_shards_own_tokens_stay_whatever_moves(ratio, features):
    expected = {
        "wq_a and wkv": twice_in_backward(256 * 37 * (7 + 5)),
        "experts": twice_in_backward(256 * 37 * (2 + 1) * 3 * 31),
    }
    if ratio:
        expected["compressor"] = twice_in_backward(256 * 37 * features * 5)
    if ratio == 4:
        expected["indexer.compressor"] = (256 * 37 * 4 * 19, 0)
        expected["indexer.weights_proj"] = (256 * 37 * 17, 0)
    assert counts(shard_operations(ODD, Layer.v4(ratio), 256)) == expected


def test_a_recomputation_repeats_what_takes_a_gradient():
    assert Operation("attention", "attend", "kernels", 2, 5).repeated == 2
    assert Operation("index scores", "select", "kernels", 2).repeated == 0


def test_all_layers_and_the_head_make_a_ranks_work():
    schedules = {
        Layer.v4(ratio): balanced(LAYOUT) if ratio else contiguous(LAYOUT) for ratio in (0, 4, 128)
    }
    expected = [3 * 256 * 37 * 41] * 4
    for rank in range(4):
        for ratio in ODD.compress_ratios:
            schedule = schedules[Layer.v4(ratio)]
            for operation in (
                *query_operations(ODD, Layer.v4(ratio), schedule.local[rank]),
                *query_operations(ODD, Layer.v4(ratio), schedule.remote[rank]),
                *shard_operations(ODD, Layer.v4(ratio), 256),
            ):
                expected[rank] += operation.forward + operation.backward
    assert work_of_ranks(ODD, schedules, Shape(LAYOUT)) == expected


@pytest.mark.parametrize("ratio", [4, 128])
def test_balance_goes_by_the_same_work_for_each_entry(ratio):
    """At ratio 4 for each entry whose index score is computed, beyond the top-k."""
    one_more, all_before = (
        counts(query_operations(ODD, Layer.v4(ratio), (range(end * ratio - 1, end * ratio),)))
        for end in (100, 99)
    )
    name = "index scores" if ratio == 4 else "attention"
    more = sum(one_more[name]) - sum(all_before[name])
    assert QueryCost.of(ODD, ratio).flops_per_entry == 2 * more


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("balance", ["off", "on"])
def test_operations_are_those_that_the_layer_computes(ratio, balance):
    if not ratio and balance == "on":
        pytest.skip("a layer without entries moves no queries")
    case = Case("boundary", ratio, 65536, 4, 2, kernels="triton", balance=balance)
    schedule = balanced(case.layout) if balance == "on" else contiguous(case.layout)
    operations = [
        *query_operations(FLASH, Layer.v4(ratio), schedule.local[2]),
        *query_operations(FLASH, Layer.v4(ratio), schedule.remote[2]),
        *(o for o in shard_operations(FLASH, Layer.v4(ratio), 16384) if o.name != "experts"),
    ]
    expected = [
        2 * sum(getattr(operation, step) for operation in operations)
        for step in ("forward", "backward")
    ]
    assert count_flops(case) == pytest.approx(expected, rel=0.02)


def test_balance_moves_work_and_makes_none():
    stay, move = (
        work_of_ranks(ODD, {Layer.v4(ratio): schedule for ratio in (0, 4, 128)}, Shape(LAYOUT))
        for schedule in (contiguous(LAYOUT), balanced(LAYOUT))
    )
    assert sum(stay) == sum(move)
    assert max(move) < max(stay)
