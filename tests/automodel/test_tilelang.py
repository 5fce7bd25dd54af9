# SPDX-License-Identifier: Apache-2.0
"""What AutoModel's TileLang kernels are handed, and where they are refused."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from nemo_automodel.components.models.deepseek_v4.optimized_kernels import (
    HAS_TILELANG,
    build_dsv4_sparse_topk_indices,
    indexer_scores_torch,
    sparse_attention_torch,
)

from nemo_dsv4_cp.automodel import tilelang
from nemo_dsv4_cp.automodel.tilelang import TileLangKernels, key_indices
from nemo_dsv4_cp.kernels.protocol import AttentionKeys
from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan, raw_tokens
from nemo_dsv4_cp.sequence.queries import Queries
from tests.kernels.cases import attend, select_entries, selections
from tests.kernels.test_reference_attention import cases


@settings(deadline=None)
@given(cases().filter(lambda case: not case[0].queries.layout.packed))
def test_the_indices_for_automodels_kernels_are_automodel(case):
    plan, _, (_, raw, entries, sinks), selected, _ = case
    queries, layout = plan.queries, plan.queries.layout
    rows, count = raw.shape[0], entries.shape[1]
    mine = key_indices(plan, AttentionKeys(raw, entries, sinks), selected).long()
    # AutoModel addresses all S raw keys from position 0.
    theirs = build_dsv4_sparse_topk_indices(
        batch_size=rows,
        seq_len=len(queries),
        key_len=layout.seq_len + count,
        window_size=plan.window,
        device=raw.device,
        compress_ratio=plan.ratio,
        compressed_topk=None if selected is None else selected.long(),
        n_pooled=count,
        vanilla_key_len=layout.seq_len,
        q_positions=queries.positions().expand(rows, -1),
    )
    tokens = [token for run in raw_tokens(queries.runs, plan.window) for token in run]
    places = torch.tensor([*tokens, *range(layout.seq_len, layout.seq_len + count)])
    as_theirs = torch.where(mine < 0, -1, places[mine.clamp(min=0)])
    for row in range(rows):
        for query in range(len(queries)):
            expected = {i for i in theirs[row, query].tolist() if i >= 0}
            assert {i for i in as_theirs[row, query].tolist() if i >= 0} == expected


class KeepsItsOutput(torch.autograd.Function):
    """Attention that needs its output in backward, as AutoModel's kernels do."""

    @staticmethod
    def forward(ctx, q, kv, sinks, indices, scale):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, kv, sinks)]
            out = sparse_attention_torch(*inputs, indices, scale)
        ctx.graph, ctx.inputs = out, inputs
        kept = out.detach()
        ctx.save_for_backward(kept)
        return kept

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors  # refused if it was written over
        assert torch.equal(kept, ctx.graph)
        return *torch.autograd.grad(ctx.graph, ctx.inputs, grad), None, None


def test_the_output_that_automodel_keeps_for_backward_is_not_written_over(monkeypatch):
    monkeypatch.setattr(tilelang, "HAS_TILELANG", True)
    monkeypatch.setattr(
        tilelang,
        "dsv4_sparse_attention",
        lambda q, kv, sinks, indices, scale, **_: KeepsItsOutput.apply(
            q, kv, sinks, indices.long(), scale
        ),
    )
    plan = AttentionPlan(Queries.own(SequenceLayout(16)), window=4, ratio=0)
    torch.manual_seed(0)
    queries, raw = torch.randn(1, 16, 2, 8), torch.randn(1, 16 + 3, 8)
    angles = torch.randn(1, 16, 2).repeat(1, 1, 2)
    results = []
    for kernels in (TileLangKernels, TorchKernels):
        inputs = [x.clone().requires_grad_() for x in (queries, raw, torch.zeros(2))]
        out = attend(
            kernels(workspace_bytes=1 << 20),
            inputs[0],
            inputs[1],
            raw.new_empty(1, 0, 8),
            inputs[2],
            None,
            (angles.cos(), angles.sin()),
            plan=plan,
            scale=0.3,
            eps=1e-6,
            groups=2,
        )
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, atol=2e-5, rtol=2e-5)


def causal_scores(q, keys, weights, *, compress_ratio, query_start, query_total_len, **_):
    """Score as AutoModel's kernel does, NaN where it would not write."""
    scores = indexer_scores_torch(q, keys, weights, 1.0)
    assert query_start >= 0
    assert query_total_len == query_start + q.shape[1]
    places = torch.arange(query_start, query_total_len)
    seen = torch.arange(keys.shape[1]) < (places[:, None] + 1) // compress_ratio
    return scores.masked_fill(~seen, torch.nan)


@pytest.mark.skipif(not tilelang._SCORES_KNOW_POSITIONS, reason="AutoModel scores whole rows only")
@settings(deadline=None)
@given(selections())
def test_scores_that_leave_out_what_lies_ahead_select_the_same(case):
    tensors, rope, options, workspace = case
    with (
        mock.patch.object(tilelang, "HAS_TILELANG", True),
        mock.patch.object(tilelang, "dsv4_indexer_scores", causal_scores),
    ):
        mine = select_entries(
            TileLangKernels(workspace_bytes=workspace),
            tensors[0].clone(),
            *tensors[1:],
            rope,
            **options,
        )
    theirs = select_entries(
        TorchKernels(workspace_bytes=1 << 20), tensors[0].clone(), *tensors[1:], rope, **options
    )
    assert torch.equal(mine, theirs)


@pytest.mark.skipif(HAS_TILELANG, reason="TileLang is installed here")
def test_where_tilelang_is_not_installed_it_is_refused_with_what_to_set():
    with pytest.raises(ValueError, match=r"TileLang is not installed.*kernels: auto"):
        TileLangKernels(workspace_bytes=1 << 20)
