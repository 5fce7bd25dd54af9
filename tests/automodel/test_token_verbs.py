# SPDX-License-Identifier: Apache-2.0
"""AutoModel's token verbs over real ranks, in the coordinates of the batch as the caller has it."""

import inspect

import pytest
import torch
from nemo_automodel.components.distributed.context_parallel.sharder import ContextParallelSharder

from nemo_dsv4_cp.automodel import token_verbs
from nemo_dsv4_cp.batch import contiguous_shard, local_token_indices
from nemo_dsv4_cp.tools.verification import packed_batch
from tests.parity import GroupMesh


def round_trip_job(group, rank, packed, trailing):
    token_verbs.install()
    batch = packed_batch([[5, 11, 3], [20]], 24, seed=0, vocab=97)
    # padding inside a row as well
    batch["seq_lens_padded"] = torch.tensor([[6, 12, 6], [24, -1000, -1000]])
    batch["labels"] = torch.full((2, 24), -100)
    batch.pop("position_ids")
    if not packed:
        batch = {key: batch[key] for key in ("input_ids", "labels")}
    real = torch.ones(2, 24, dtype=torch.bool)
    if packed:
        real[0, [5, 17, 21, 22, 23]], real[1, 20:] = False, False
    sharder = ContextParallelSharder(
        shard_batch=contiguous_shard, local_token_global_indices=local_token_indices
    )
    sharder._cp_mesh = GroupMesh(group)
    ids = batch["input_ids"].clone()
    _, cut = sharder.shard(batch)
    ids_shard = sharder.shard_token_tensor(ids, fill=0)

    tensor = torch.rand(2, 24, *trailing, generator=torch.Generator().manual_seed(1))
    tensor.requires_grad_()
    shard = sharder.shard_token_tensor(tensor, fill=-1.0)
    back = sharder.gather_token_tensor(shard * (rank + 1), trim=True, fill=-2.0)
    # Each rank's copy of the result receives a gradient of 1.
    back.sum().backward()
    scale = back.detach() / tensor.detach()
    return {
        "ids": torch.equal(ids_shard, cut["input_ids"]),
        "shape": back.shape == tensor.shape,
        "scaled by its owner": bool((scale[real] > 0.99).all()),
        "filled": bool((back[~real] == -2.0).all()),
        "gradient of what left this rank": float(tensor.grad.sum())
        == pytest.approx(3 * (rank + 1) * shard.detach().ne(-1.0).sum().item()),
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("trailing", [(), (7,)])
def test_any_per_token_tensor_makes_the_round_trip(ranks, packed, trailing):
    for answers in ranks.run(round_trip_job, 3, packed, trailing):
        assert all(answers.values()), answers


def test_installing_again_changes_nothing():
    token_verbs.install()
    wrapped = ContextParallelSharder.gather_token_tensor
    token_verbs.install()
    assert ContextParallelSharder.gather_token_tensor is wrapped
    assert "fill" in inspect.signature(wrapped).parameters
