# SPDX-License-Identifier: Apache-2.0
"""Attention layers over real gloo ranks against AutoModel's layer at CP size 1."""

import inspect

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nemo_automodel.components.models.deepseek_v4.layers import (
    DeepseekV4Indexer,
    DeepseekV4RotaryEmbedding,
)
from nemo_automodel.components.models.deepseek_v4.optimized_kernels import HAS_TILELANG

from nemo_dsv4_cp.attention import ContextParallelAttention
from nemo_dsv4_cp.kernels.reference import TorchKernels
from tests.examples import examples
from tests.meshes import FakeMesh
from tests.parity import assert_parity, attention_job, cpu_backend, randomise, tiny_config
from tests.ranks import RankError

pytestmark = pytest.mark.capability("attention layers, 1 to 8 ranks")
ALL_GATHER = {"transport": "all_gather"}
# AutoModel 0.5 chooses among entries of the future too, and then drops those.
AUTOMODEL_CHOOSES_AMONG_ALL = "valid_end" not in inspect.getsource(DeepseekV4Indexer.forward)
SLOW = pytest.mark.slow  # drawn cases cover these sizes, too
TRANSPORTS = ["all_gather", "boundary"]


def oracle_job(group, rank, *arguments):
    """A layer against AutoModel's; where that also selects future entries, both select all."""
    changes = {"index_topk": 512} if AUTOMODEL_CHOOSES_AMONG_ALL else {}
    return attention_job(group, rank, *arguments, **changes)


@pytest.fixture
def record_the_limit(record_property):
    if AUTOMODEL_CHOOSES_AMONG_ALL:
        record_property(
            "but",
            "except top-k selection, in which this release also selects future entries",
        )


@pytest.mark.usefixtures("record_the_limit")
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", [pytest.param(1, marks=SLOW), 2, pytest.param(4, marks=SLOW)])
@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize(("rows", "seq_len"), [(2, 777), (1, 1024)])
def test_a_layer_equals_automodels_at_one_rank(ranks, transport, ratio, size, rows, seq_len):
    options = {"transport": transport}
    assert_parity(ranks.run(oracle_job, size, ratio, rows, seq_len, options))


@pytest.mark.usefixtures("record_the_limit")
@pytest.mark.parametrize("size", [pytest.param(3, marks=SLOW), pytest.param(5, marks=SLOW), 8])
@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_odd_and_many_ranks_equal_automodels_layer(ranks, ratio, size):
    options = {"transport": "boundary", "balance": "on"}
    assert_parity(ranks.run(oracle_job, size, ratio, 1, 500, options))


# No shrinking: after a failed case the workers start anew, which takes seconds.
@settings(
    max_examples=examples(fixed=50, random=100, many=300),
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    transport=st.sampled_from(TRANSPORTS),
    size=st.sampled_from([2, 3, 4, 5]),
    ratio=st.sampled_from([0, 4, 4, 16]),
    balance=st.sampled_from(["on", "on", "off"]),
    overlap=st.booleans(),
    rows=st.integers(1, 3),
    seq_len=st.integers(1, 140),
    window=st.integers(1, 40),
    recompute=st.booleans(),
    workspace_mib=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_layer_equals_automodel(
    ranks, transport, size, ratio, balance, overlap, rows, seq_len, window, recompute,
    workspace_mib, seed,
):  # fmt: skip
    options = {"transport": transport, "workspace_mib": workspace_mib}
    options |= {"balance": balance, "overlap": overlap}
    assert_parity(
        ranks.run(
            attention_window_job, size, ratio, rows, seq_len, options, recompute, seed, window
        )
    )


def attention_window_job(group, rank, ratio, rows, seq_len, options, recompute, seed, window):
    return attention_job(
        group, rank, ratio, rows, seq_len, options, recompute, seed, sliding_window=window
    )


def straddling_job(group, rank):
    config = tiny_config([128])
    attention = ContextParallelAttention(config, 0, cpu_backend())
    attention._cp_group = group
    return call(attention, torch.randn(1, 100, config.hidden_size))


def call(attention, hidden, **kwargs):
    rope = DeepseekV4RotaryEmbedding(10000.0, attention.head_dim, 0.5)
    positions = torch.arange(hidden.shape[1]).expand(hidden.shape[0], -1)
    return attention(
        hidden,
        rope(hidden, positions),
        position_embeddings_compress=rope(hidden, positions),
        rotary_compress=rope,
        **kwargs,
    )[0]


def test_a_shard_that_cuts_a_window_is_refused_on_every_rank(ranks):
    with pytest.raises(RankError, match="shard of 100 tokens cannot work with compress ratio 128"):
        ranks.run(straddling_job, 2)


def make(ratio=4, **changes):
    attention = ContextParallelAttention(tiny_config([ratio], **changes), 0, cpu_backend())
    randomise(attention, 0)
    return attention


def test_the_attention_mask_is_not_read():
    attention, hidden = make(), torch.randn(1, 40, 64)
    blocked = torch.full((1, 1, 40, 40), -1e9)
    assert torch.equal(
        call(attention, hidden), call(attention, hidden, attention_mask=blocked, is_causal=True)
    )


def test_the_future_never_reaches_the_past():
    for ratio in (0, 4, 128):
        attention, hidden = make(ratio), torch.randn(1, 300, 64)
        other = hidden.clone()
        other[:, 201:] = torch.randn(1, 99, 64)
        assert torch.equal(call(attention, hidden)[:, :201], call(attention, other)[:, :201])


def test_a_row_shorter_than_a_window_has_no_entries():
    out = call(make(128), torch.randn(2, 5, 64))
    assert out.shape == (2, 5, 64)
    assert out.isfinite().all()


@pytest.mark.skipif(
    not hasattr(ContextParallelAttention, "setup_cp_attention"),
    reason="shown by training: without that contract, the group comes with the batch",
)
def test_the_group_of_setup_cp_attention_is_used():
    attention = make()
    attention.setup_cp_attention(FakeMesh(2, group="the CP group"))
    assert attention._cp_group == "the CP group"


def named_kernels(attn, **options):
    backend = cpu_backend()
    backend.attn = attn
    config = tiny_config([4], context_parallel=options)
    return type(ContextParallelAttention(config, 0, backend)._kernels)


def test_kernels_are_those_that_the_block_names_or_that_the_backend_selects():
    assert named_kernels("sdpa") is TorchKernels
    assert named_kernels("tilelang", kernels="torch") is TorchKernels


@pytest.mark.skipif(HAS_TILELANG, reason="TileLang is installed here")
def test_kernels_that_are_not_installed_are_refused_where_the_block_names_them():
    assert named_kernels("tilelang", kernels="auto") is TorchKernels
    with pytest.raises(ValueError, match=r"context_parallel\.kernels: tilelang needs it"):
        named_kernels("sdpa", kernels="tilelang")


def test_what_training_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"start_pos=3"):
        call(make(), torch.randn(1, 8, 64), start_pos=3)
    with pytest.raises(ValueError, match=r"attention_dropout=0.1 .*attention_dropout: 0.0"):
        make(attention_dropout=0.1)
