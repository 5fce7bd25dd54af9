# SPDX-License-Identifier: Apache-2.0
"""Which rank computes which queries: every query once, equal rows, and balanced work."""

import random
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_dsv4_cp.gpus import GPUS
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.schedule import (
    QueryCost,
    Schedules,
    SelectionCost,
    balanced,
    contiguous,
    entries_seen,
)
from nemo_dsv4_cp.tools.sizes import ModelSizes, read_model_fields
from tests.kernels.cases import layouts

FLASH = ModelSizes.of_fields(read_model_fields("v4_flash"))


def packed(starts, local_len, cp_size):
    return SequenceLayout.of_documents(torch.tensor(starts), local_len, cp_rank=0, cp_size=cp_size)


def largest_over_mean(layout, schedule, ratio):
    seen = entries_seen(layout, schedule, ratio)
    return max(seen) * len(seen) / sum(seen)


@given(st.data())
def test_every_query_is_computed_once_and_every_rank_computes_as_many(data):
    layout = layouts(data.draw, data.draw(st.integers(1, 3)))
    schedule = balanced(layout)
    computed = []
    for rank in range(layout.cp_size):
        local, remote = schedule.local[rank], schedule.remote[rank]
        assert all(run and run.start in layout.shard(rank) for run in local if run)
        rows = [token for run in (*local, *remote) for token in run]
        assert len(rows) == layout.local_len
        computed += rows
        for runs in (local, remote):
            assert all(
                a.stop <= b.start for a, b in pairwise(runs)
            )  # kernels search ascending rows
    assert sorted(computed) == list(range(layout.seq_len))


@pytest.mark.parametrize("ratio", [1, 2, 4, 128])
@pytest.mark.parametrize("cp_size", [8, 64, 5])
def test_halves_balance_rows_of_one_document(ratio, cp_size):
    layout = SequenceLayout(16384, 0, cp_size)
    assert largest_over_mean(layout, contiguous(layout), ratio) > 1.5
    assert largest_over_mean(layout, balanced(layout), ratio) < 1.001
    moved = [sum(map(len, runs)) for runs in balanced(layout).remote]
    assert moved == [8192] * cp_size


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [1, 2])
def test_packs_of_short_and_long_documents_are_balanced(seed, rows):
    draw, seq_len = random.Random(seed), 1 << 20
    starts = []
    for _ in range(rows):
        row = [0]
        while row[-1] < seq_len:
            row.append(row[-1] + draw.randint(1_000, 200_000))
        starts.append(row[:-1])
    longest = max(map(len, starts))
    layout = packed([row + [seq_len] * (longest - len(row)) for row in starts], seq_len // 64, 64)
    for ratio in (1, 2, 4, 128):
        assert largest_over_mean(layout, contiguous(layout), ratio) > 1.5
        assert largest_over_mean(layout, balanced(layout), ratio) <= 1.06
    assert max(len(runs) for runs in balanced(layout).remote) <= 16


def test_equal_documents_stay_where_they_are():
    layout = packed([[0, 64, 128, 192]], 64, 4)
    assert not balanced(layout).moves


def test_auto_balances_what_spares_more_than_it_costs():
    def moves(layout, ratio=4, balance="auto", gpu="h100"):
        cost = QueryCost.of(FLASH, ratio)
        return Schedules(layout, balance, GPUS[gpu]).of(ratio, cost).moves

    assert not moves(SequenceLayout(512, 0, 8))
    assert moves(SequenceLayout(16384, 0, 8))
    assert moves(SequenceLayout(16384, 0, 8), 128)
    assert not moves(packed([[k * 16384 for k in range(8)]], 16384, 8))
    for layout in (SequenceLayout(16384), SequenceLayout(1, 0, 8)):  # nobody, or nothing, to give
        assert not moves(layout, balance="on")
    assert moves(SequenceLayout(2, 0, 8), balance="on")
    assert not moves(SequenceLayout(16384, 0, 64), balance="off")


def test_auto_decides_by_the_rates_of_the_gpu():
    cost, layout = QueryCost.of(FLASH, 4), SequenceLayout(4096, 0, 16)
    slow = replace(GPUS["h100"], tflops=GPUS["h100"].tflops / 100)
    fast = replace(GPUS["h100"], tflops=GPUS["h100"].tflops * 100)
    assert Schedules(layout, "auto", slow).of(4, cost).moves
    assert not Schedules(layout, "auto", fast).of(4, cost).moves


V41_FLASH = SimpleNamespace(
    index_n_heads=32, index_head_dim=128, index_topk=512, candidate_topk_blocks=2048
)


@pytest.mark.parametrize("chooses", [False, True])
def test_selecting_for_a_query_costs_what_crosses_both_ways(chooses):
    cost = SelectionCost.of(V41_FLASH, head_bytes=68, chooses_candidates=chooses)
    # Index queries and their weights; top-k indices, back to the owner, and candidates.
    assert cost.sent_forward == 32 * 68 + 32 * 2 + 512 * 4 + (2048 * 4 if chooses else 0)
    assert (cost.sent_backward, cost.flops_per_entry) == (0, 2 * 32 * 128)
    short, long = SequenceLayout(512, 0, 8), SequenceLayout(16384, 0, 8)
    for ratio in (1, 2):
        moves = [
            Schedules(each, "auto", GPUS["h100"]).of(ratio, cost).moves for each in (short, long)
        ]
        assert moves == [False, True]
        assert not Schedules(long, "on", GPUS["h100"]).of(ratio, None).moves


def test_a_query_costs_what_crosses_for_it():
    # A low-rank query, a raw key, angles, index weights; the layer's output, back to the owner.
    assert QueryCost.of(FLASH, 4).sent_forward == 2048 + 1024 + 256 + 256 + 8192
    assert QueryCost.of(FLASH, 4).flops_per_entry == 2 * 64 * 128
    assert QueryCost.of(FLASH, 128).sent_forward == 2048 + 1024 + 256 + 8192
    assert QueryCost.of(FLASH, 128).flops_per_entry == 14 * 64 * 512
