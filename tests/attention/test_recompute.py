# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing: what is kept, and that no recomputation can deadlock."""

import pytest
import torch
from nemo_automodel.components.distributed.activation_checkpointing import (
    make_selective_checkpoint_context_fn,
)
from torch.utils.checkpoint import checkpoint

from nemo_dsv4_cp.attention import ContextParallelAttention
from nemo_dsv4_cp.attention.indexer import KeptIndices
from tests.parity import cpu_backend, randomise, rope_of, tiny_config


def microbatches_job(group, rank, keep, shared_rope, selective=False, balance="off"):
    """Two checkpointed microbatches in flight, backward in reverse; count top-k selections.

    With load balancing, remote and local queries are selected for separately.
    """
    options = {"keep_index_choice": keep, "balance": balance}
    parts = 2 if balance == "on" else 1
    config = tiny_config([4], context_parallel=options)
    layer = ContextParallelAttention(config, 0, cpu_backend())
    randomise(layer, 0)
    layer._cp_group = group
    saving = {"context_fn": make_selective_checkpoint_context_fn()} if selective else {}
    made = 0
    original = layer._kernels.select_entries

    def counting(*args, **kwargs):
        nonlocal made
        made += 1
        return original(*args, **kwargs)

    layer._kernels.select_entries = counting
    try:
        gradients = {}
        for recompute in (False, True):
            layer.zero_grad()
            generator = torch.Generator().manual_seed(1 + rank)
            outs = []
            rope = None
            for _ in range(2):
                hidden = torch.randn(1, 96, 64, generator=generator, requires_grad=True)
                if rope is None or not shared_rope:
                    rope = rope_of(config, rank * 96, 96)

                def run(x, rope=rope):
                    arguments = {
                        "position_embeddings_compress": rope[0],
                        "rotary_compress": rope[1],
                    }
                    return layer(x, rope[0], **arguments)[0]

                if recompute:
                    made_before = made
                    outs.append(checkpoint(run, hidden, use_reentrant=False, **saving))
                    assert made == made_before + parts
                else:
                    outs.append(run(hidden))
            counted = made
            for out in reversed(outs):
                out.square().sum().backward()
            gradients[recompute] = [
                p.grad.clone() for p in layer.parameters() if p.grad is not None
            ]
            again = (made - counted) // parts
    finally:
        layer._kernels.select_entries = original
    same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients.values(), strict=True))
    return same, again


BALANCE = pytest.mark.parametrize("balance", ["on", "off"])


@BALANCE
def test_kept_top_k_indices_are_not_selected_again(ranks, balance):
    assert ranks.run(microbatches_job, 2, True, False, False, balance) == [(True, 0)] * 2


@BALANCE
def test_without_the_option_they_are_selected_again(ranks, balance):
    assert ranks.run(microbatches_job, 2, False, False, False, balance) == [(True, 2)] * 2


def test_two_forwards_that_share_a_rotary_embedding_take_no_others_indices(ranks):
    assert ranks.run(microbatches_job, 2, True, True) == [(True, 2)] * 2


@BALANCE
def test_automodels_selective_checkpointing_loses_no_count(ranks, balance):
    """It saves every other matrix product and every top-k, and hands them back by number."""
    assert ranks.run(microbatches_job, 2, True, False, True, balance) == [(True, 0)] * 2
    assert ranks.run(microbatches_job, 2, False, False, True, balance) == [(True, 2)] * 2


def test_top_k_indices_live_no_longer_than_their_key():
    kept, key = KeptIndices(), torch.ones(1)
    kept.keep(key, torch.ones(1, dtype=torch.int32))
    assert kept.recall(key) is None  # not in a recomputation
    assert len(kept._indices) == 1
    del key
    assert len(kept._indices) == 0
