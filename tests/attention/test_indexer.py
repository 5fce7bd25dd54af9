# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from nemo_automodel.components.models.deepseek_v4.layers import DeepseekV4RotaryEmbedding

from nemo_dsv4_cp.attention import ContextParallelAttention
from nemo_dsv4_cp.attention.indexer import Indexer
from nemo_dsv4_cp.kernels.protocol import IndexQueries
from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries
from tests.parity import cpu_backend, randomise, tiny_config


def select(workspace_bytes, layout, index_topk=8, rows=2):
    config = tiny_config([4], index_topk=index_topk)
    attention = ContextParallelAttention(config, 0, cpu_backend())
    randomise(attention, 0)
    indexer = Indexer(attention.compressor.indexer, None)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, layout.local_len, config.hidden_size, generator=generator)
    residual = torch.randn(rows, layout.local_len, config.q_lora_rank, generator=generator)
    keys = torch.randn(rows, layout.seq_len // 4, config.index_head_dim, generator=generator)
    rope = DeepseekV4RotaryEmbedding(10000.0, config.head_dim, 0.5)
    embeddings = rope(hidden, layout.positions().expand(rows, -1))
    with torch.no_grad():
        queries = IndexQueries(
            indexer.queries(residual),
            indexer.weights(hidden),
            embeddings,
            AttentionPlan(Queries.own(layout), config.sliding_window, 4),
        )
        kernels = TorchKernels(workspace_bytes=workspace_bytes)
        return kernels.select_entries(queries, keys, topk=index_topk)


@pytest.mark.parametrize("workspace_bytes", [1, 50_000, 300_000])
def test_cutting_the_rows_into_chunks_changes_no_index(workspace_bytes):
    layout = SequenceLayout(96, 1, 2)
    assert torch.equal(select(workspace_bytes, layout), select(1 << 30, layout))


def test_only_complete_past_entries_are_selected_each_once():
    layout = SequenceLayout(96, 1, 2)
    for row in select(1 << 20, layout, index_topk=40):
        for position, selected in zip(layout.positions().tolist(), row.tolist(), strict=True):
            real = [entry for entry in selected if entry != NOTHING]
            assert len(set(real)) == len(real) == min(40, (position + 1) // 4)
            assert all((entry + 1) * 4 - 1 <= position for entry in real)


def test_a_row_too_short_for_an_entry_selects_nothing():
    assert select(1 << 20, SequenceLayout(3)).shape == (2, 3, 0)
