# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_dsv4_cp.sequence.layout import (
    SequenceLayout,
    local_seq_multiple,
    padded_seq_len,
    validate_cp_size,
)
from nemo_dsv4_cp.sequence.windows import Windows

ratio_lists = st.lists(st.sampled_from([0, 2, 3, 4, 128]), max_size=6)


@given(ratio_lists)
def test_local_seq_multiple_is_the_least_length_that_every_layer_accepts(ratios):
    needs = [8 if r == 4 else r for r in ratios if r > 0]
    multiple = local_seq_multiple(ratios)
    assert all(multiple % need == 0 for need in needs)
    for smaller in range(1, multiple):
        assert any(smaller % need for need in needs)


@given(st.integers(1, 5000), st.integers(1, 9), st.integers(1, 130))
def test_padded_seq_len_is_the_smallest_that_cuts_evenly(seq_len, cp_size, pad_multiple):
    padded = padded_seq_len(seq_len, cp_size=cp_size, pad_multiple=pad_multiple)
    step = cp_size * max(pad_multiple, 2)
    assert padded % step == 0
    assert 0 <= padded - seq_len < step


@given(st.integers(1, 6), st.integers(1, 40), st.sampled_from([1, 2, 4]))
def test_ranks_own_every_token_and_window_once(cp_size, blocks, ratio):
    layouts = [SequenceLayout(blocks * ratio, rank, cp_size) for rank in range(cp_size)]
    tokens = torch.cat([layout.positions() for layout in layouts])
    assert tokens.tolist() == list(range(layouts[0].seq_len))
    starts = torch.cat([Windows.of(layout, ratio).starts for layout in layouts], dim=1)[0]
    assert starts.tolist() == list(range(0, layouts[0].seq_len, ratio))


@given(st.integers(1, 4), st.integers(1, 30), st.sampled_from([2, 4, 128]))
def test_an_entry_is_visible_once_its_last_token_is_past(cp_size, local_len, ratio):
    for rank in range(cp_size):
        layout = SequenceLayout(local_len, rank, cp_size)
        first, stop = layout.visible_entries(layout.positions(), ratio)
        assert not first.any()
        for row, position in enumerate(layout.positions().tolist()):
            complete = [w for w in range(local_len * cp_size) if (w + 1) * ratio - 1 <= position]
            assert stop[0, row] == len(complete)
            assert layout.entry_span(range(position, position + 1), ratio) == range(len(complete))
        assert layout.entries_seen(layout.own, ratio) == stop.sum()


def test_a_window_that_straddles_a_cut_is_refused_with_the_length_that_works():
    with pytest.raises(ValueError, match=r"shard of 130 tokens .* ratio 128.*multiple of 128"):
        Windows.of(SequenceLayout(130, 0, 2), 128)
    assert Windows.of(SequenceLayout(130), 128).count == 1  # one rank has no cut


def test_unequal_shards_are_refused_with_a_length_that_works():
    with pytest.raises(ValueError, match=r"cp_size=4.*pad it to 16"):
        SequenceLayout.of_padded(10, cp_rank=0, cp_size=4)


def test_the_multiple_of_v4_flash_is_128():
    assert local_seq_multiple([0, 0, 4] + [128, 4] * 20 + [0]) == math.lcm(8, 128) == 128
    assert local_seq_multiple(None) == local_seq_multiple([]) == local_seq_multiple([0]) == 1


def test_more_ranks_than_the_longest_row_has_shards_for_are_refused():
    validate_cp_size(32, pad_multiple=128, max_seq_len=4096)
    with pytest.raises(ValueError, match=r"distributed.cp_size=33 .*4096.* use 32 or fewer"):
        validate_cp_size(33, pad_multiple=128, max_seq_len=4096)
