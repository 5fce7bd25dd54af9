"""What the host's TileLang kernels are handed, and where they are refused."""

import pytest
import torch
from hypothesis import given, settings
from nemo_automodel.components.models.deepseek_v4.optimized_kernels import (
    HAS_TILELANG,
    build_dsv4_sparse_topk_indices,
)

from nemo_dsv4_cp.host.tilelang import TileLangKernels, key_indices
from tests.kernels.test_reference_attention import cases


@settings(deadline=None)
@given(cases())
def test_the_indices_for_the_hosts_kernels_are_the_hosts(case):
    plan, _, (_, raw, entries, _), chosen, _ = case
    layout = plan.layout
    rows, count = raw.shape[0], entries.shape[1]
    mine = key_indices(plan, raw, entries, chosen).long()
    # The host addresses all S raw keys from position 0.
    theirs = build_dsv4_sparse_topk_indices(
        batch_size=rows,
        seq_len=layout.local_len,
        key_len=layout.seq_len + count,
        window_size=plan.window,
        device=raw.device,
        compress_ratio=plan.ratio,
        compressed_topk=None if chosen is None else chosen.long(),
        n_pooled=count,
        vanilla_key_len=layout.seq_len,
        q_positions=layout.positions().expand(rows, -1),
    )
    in_mine = raw.shape[1]
    as_theirs = torch.where(mine >= in_mine, mine - in_mine + layout.seq_len, mine + plan.raw_first)
    as_theirs = torch.where(mine < 0, -1, as_theirs)
    for row in range(rows):
        for query in range(layout.local_len):
            expected = {i for i in theirs[row, query].tolist() if i >= 0}
            assert {i for i in as_theirs[row, query].tolist() if i >= 0} == expected


@pytest.mark.skipif(HAS_TILELANG, reason="TileLang is installed here")
def test_where_tilelang_is_not_installed_it_is_refused_with_what_to_set():
    with pytest.raises(ValueError, match=r"TileLang is not installed.*kernels: torch"):
        TileLangKernels(workspace_bytes=1 << 20)
