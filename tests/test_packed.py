# SPDX-License-Identifier: Apache-2.0
"""Packed rows over real gloo ranks: every document is as if it ran alone at CP size 1."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from nemo_dsv4_cp.batch import contiguous_shard
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from nemo_dsv4_cp.tools.verification import packed_batch
from tests.examples import examples
from tests.packed_parity import packed_attention_job, packed_model_job
from tests.parity import GroupMesh, assert_parity, cpu_backend, randomise, tiny_config

SLOW = pytest.mark.slow  # other sizes of what the rest shows
TRANSPORTS = ["all_gather", "boundary"]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", [*(pytest.param(n, marks=SLOW) for n in (1, 2, 3)), 8])
@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_a_layer_keeps_documents_apart(ranks, transport, ratio, size):
    documents = [[1, 300, 3, 130, 4, 129], [513, 54]]
    assert_parity(ranks.run(packed_attention_job, size, ratio, documents, {"transport": transport}))


def window_job(group, rank, ratio, documents, options, recompute, seed, spare, window):
    return packed_attention_job(
        group, rank, ratio, documents, options, recompute, seed, spare, sliding_window=window
    )


@settings(
    max_examples=examples(fixed=30, random=60, many=150),
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    transport=st.sampled_from(TRANSPORTS),
    size=st.sampled_from([2, 3, 4, 5]),
    balance=st.sampled_from(["on", "on", "off"]),
    overlap=st.booleans(),
    ratio=st.sampled_from([0, 4, 4, 16]),
    documents=st.lists(
        st.lists(st.one_of(st.integers(1, 12), st.integers(1, 90)), min_size=1, max_size=6),
        min_size=1,
        max_size=2,
    ),
    window=st.integers(1, 40),
    recompute=st.booleans(),
    spare=st.integers(0, 5),
    workspace_mib=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_any_documents_stay_apart(
    ranks, transport, size, balance, overlap, ratio, documents, window, recompute, spare,
    workspace_mib, seed,
):  # fmt: skip
    options = {"transport": transport, "workspace_mib": workspace_mib}
    options |= {"balance": balance, "overlap": overlap}
    arguments = (ratio, documents, options, recompute, seed, spare, window)
    assert_parity(ranks.run(window_job, size, *arguments))


@pytest.mark.parametrize("size", [pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)])
@pytest.mark.parametrize("mtp_layers", [0, 2])
def test_a_moe_model_keeps_documents_apart(ranks, size, mtp_layers):
    documents = [[70, 5, 140, 1], [216]]
    options = {"transport": "boundary", "balance": "on"}
    assert_parity(
        ranks.run(packed_model_job, size, [0, 4, 128, 4], documents, options, 0, mtp_layers)
    )


def test_padding_documents_changes_no_number(ranks):
    options = {"pad_documents": True}
    documents = [[70, 5, 140, 1], [216]]
    assert_parity(ranks.run(packed_model_job, 2, [0, 4, 128, 4], documents, options))


def test_multi_token_prediction_of_one_document_a_row(ranks):
    options = {"transport": "boundary", "balance": "on"}
    assert_parity(ranks.run(packed_model_job, 2, [4, 128], [[300], [211]], options, 0, 1))


def fsdp_job(group, rank):
    """Twenty FSDP2 steps; the last rank holds documents of 2 tokens, so no window at all."""
    config = tiny_config([4, 128], context_parallel={"balance": "on"})
    model = DeepseekV4ContextParallelForCausalLM(config, backend=cpu_backend())
    model.initialize_weights(torch.device("cpu"), torch.float32)
    randomise(model, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." not in name)
    mesh = DeviceMesh.from_group(group, "cpu")
    for block in model.model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    sharder = model.prepare_model_inputs_for_cp({})["cp_sharder"]
    documents = [[300, 212, *[2] * 128]]
    losses = []
    for _ in range(20):
        batch = packed_batch(documents, 768, seed=0, vocab=97)
        _, batch, _ = sharder.shard_batch(GroupMesh(group), None, batch)
        labels = batch.pop("labels")
        logits = model(**batch).logits
        # FSDP2 averages over ranks: the mean of the ranks' means is that of the whole row.
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_rank_without_a_complete_window_trains_with_fsdp2(ranks):
    for losses in ranks.run(fsdp_job, 3):
        assert len(losses) == 20
        assert losses[-1] < losses[0] - 0.2


def differing_job(group, rank, difference):
    documents = {"documents": [[8, 8]], "tokens": [[16]]}
    rows = documents[difference] if rank == 1 else [[16]]
    batch = packed_batch(rows, 24 if rank == 1 and difference == "tokens" else 16, seed=0, vocab=97)
    try:
        contiguous_shard(GroupMesh(group), None, batch, compare_ranks=True)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("difference", ["documents", "tokens"])
def test_ranks_that_hold_different_batches_refuse_them_all(ranks, difference):
    for refusal in ranks.run(differing_job, 3, difference):
        assert "hold different batches" in refusal


def refusals_job(group, rank, compare):
    model = DeepseekV4ContextParallelForCausalLM(
        tiny_config([4], context_parallel={"compare_ranks": compare}), backend=cpu_backend()
    )
    sharder = model.prepare_model_inputs_for_cp({})["cp_sharder"]
    refused = []
    for step in range(3):
        batch = packed_batch([[16]] if rank and step else [[8, 8]], 16, seed=0, vocab=97)
        try:
            sharder.shard_batch(GroupMesh(group), None, batch)
        except ValueError:
            refused.append(step)
    return refused


@pytest.mark.parametrize(("compare", "refused"), [("first", []), ("every", [1, 2]), ("never", [])])
def test_batches_are_compared_when_the_option_says(ranks, compare, refused):
    assert ranks.run(refusals_job, 2, compare) == [refused] * 2
