# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds against queries and tokens counted one by one."""

import dataclasses

import pytest

from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.schedule import balanced, contiguous
from nemo_dsv4_cp.tools import work
from nemo_dsv4_cp.tools.sizes import ModelSizes, read_model_fields

# No two sizes alike, so that none can stand for another.
ODD = dataclasses.replace(
    ModelSizes.of_fields(read_model_fields("v4_flash")),
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


def twice_in_backward(multiply_adds):
    return work.Count(multiply_adds, 2 * multiply_adds)


def by_hand(ratio, positions):
    """The work of queries one after another: 3 heads of 5, window 29, top-k 23 of 17 x 19."""
    projection = index_projection = choice = product = output = 0
    for position in positions:
        keys = min(position + 1, 29)
        entries = (position + 1) // ratio if ratio else 0
        product += 3 * 5 * (keys + (min(entries, 23) if ratio == 4 else entries))
        projection += 7 * 3 * 5
        output += 3 * 5 * 11 + 13 * 11 * 37
        if ratio == 4:
            index_projection += 7 * 17 * 19
            choice += entries * 17 * 19
    return work.QueryWork(
        projection=twice_in_backward(projection),
        index_projection=work.Count(index_projection, 0),
        choice=work.Count(choice, 0),
        attention=work.Count(2 * product, 5 * product),
        output=twice_in_backward(output),
    )


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("shared", [False, True])
def test_queries_are_counted_where_they_are_computed(ratio, shared):
    schedule = balanced(LAYOUT, ratio) if shared else contiguous(LAYOUT)
    for rank in range(4):
        counted = work.layer_work(ODD, ratio, schedule, rank, 256)
        kept = [i for run in schedule.local[rank] for i in run]
        taken = [i for run in schedule.remote[rank] for i in run]
        assert counted.kept == by_hand(ratio, kept)
        assert counted.taken == by_hand(ratio, taken)
        assert len(taken) == (128 if shared else 0)


@pytest.mark.parametrize(("ratio", "features"), [(0, 0), (4, 4), (128, 2)])
def test_a_shards_own_tokens_stay_whatever_moves(ratio, features):
    index = ratio == 4
    assert work.shard_work(ODD, ratio, 256) == work.ShardWork(
        projections=twice_in_backward(256 * 37 * (7 + 5)),
        compression=twice_in_backward(256 * 37 * features * 5),
        index_compression=work.Count(256 * 37 * 4 * 19 * index, 0),
        index_weights=work.Count(256 * 37 * 17 * index, 0),
        experts=twice_in_backward(256 * 37 * (2 + 1) * 3 * 31),
    )


def test_a_recomputation_repeats_what_takes_a_gradient():
    layer = work.layer_work(ODD, 4, contiguous(LAYOUT), 3, 256)
    assert layer.kept.attention.repeated == layer.kept.attention.forward > 0
    assert layer.kept.choice.forward > layer.kept.choice.repeated == 0


def test_all_layers_and_the_head_make_a_ranks_work():
    schedules = {ratio: balanced(LAYOUT, ratio) for ratio in (4, 128)} | {0: contiguous(LAYOUT)}
    expected = [3 * 256 * 37 * 41] * 4
    for rank in range(4):
        for ratio in ODD.compress_ratios:
            layer = work.layer_work(ODD, ratio, schedules[ratio], rank, 256)
            for part in (layer.kept, layer.taken, layer.shard):
                for field in dataclasses.fields(part):
                    count = getattr(part, field.name)
                    expected[rank] += count.forward + count.backward
    assert work.work_of_ranks(ODD, schedules, 256) == expected


def test_balance_moves_work_and_makes_none():
    stay, move = (
        work.work_of_ranks(ODD, {0: contiguous(LAYOUT), 4: schedule, 128: schedule}, 256)
        for schedule in (contiguous(LAYOUT), balanced(LAYOUT, 4))
    )
    assert sum(stay) == sum(move)
    assert max(move) < max(stay)
