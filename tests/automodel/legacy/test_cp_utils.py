# SPDX-License-Identifier: Apache-2.0
"""The batch function of earlier training loops, over AutoModel's sharder."""

import contextlib
import functools

import pytest
import torch

from nemo_dsv4_cp.automodel import make_cp_batch_and_ctx
from nemo_dsv4_cp.automodel.sharding import HAS_SHARDER
from nemo_dsv4_cp.cp import make_dsv4_contiguous_shard_cp_batch_and_ctx
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from tests.meshes import FakeMesh
from tests.parity import cpu_backend, tiny_config


class JobMesh:
    """A mesh of a job, of which a CP rank of two is all."""

    mesh_dim_names = ("dp", "cp")

    def __getitem__(self, name):
        return {"cp": FakeMesh(2, 1)}[name]


def batch_of(seq_len):
    return {"input_ids": torch.arange(seq_len)[None], "labels": torch.arange(seq_len)[None]}


def test_a_function_in_the_batch_is_called_with_the_meshes():
    called = []

    def batch_fn(cp_mesh, tp_mesh, batch, *, loss_mask, padding_token_id):
        called.append((cp_mesh.size(), tp_mesh, loss_mask, padding_token_id))
        return contextlib.nullcontext, {"cut": True} | batch

    batch = batch_of(8) | {"_cp_make_batch_fn": batch_fn}
    context, cut = make_cp_batch_and_ctx(JobMesh(), batch, padding_token_id=3)
    assert context is contextlib.nullcontext
    assert called == [(2, None, None, 3)]
    assert cut["cut"]
    assert "_cp_make_batch_fn" not in cut


def test_the_seeds_function_rides_in_the_batch():
    make = functools.partial(make_dsv4_contiguous_shard_cp_batch_and_ctx, pad_multiple=8)
    _, cut = make_cp_batch_and_ctx(JobMesh(), batch_of(20) | {"_cp_make_batch_fn": make})
    assert cut["input_ids"].tolist() == [[16, 17, 18, 19, 0, 0, 0, 0] + [0] * 8][:1]


def test_without_a_function_the_models_own_sharder_cuts():
    model = DeepseekV4ContextParallelForCausalLM(
        tiny_config([4], context_parallel={"compare_ranks": "never"}), backend=cpu_backend()
    )
    _, cut = make_cp_batch_and_ctx(JobMesh(), batch_of(16), model=model)
    assert cut["input_ids"].tolist() == [list(range(8, 16))]


def test_without_cp_the_batch_stays_as_it_is():
    _, cut = make_cp_batch_and_ctx(None, batch_of(5))
    assert cut["input_ids"].tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.skipif(not HAS_SHARDER, reason="this release's own function takes it")
def test_what_automodel_no_longer_takes_is_refused():
    with pytest.raises(ValueError, match=r"use_te=True.*leave both out"):
        make_cp_batch_and_ctx(None, batch_of(5), use_te=True)
