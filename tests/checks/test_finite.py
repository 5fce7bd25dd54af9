# SPDX-License-Identifier: Apache-2.0
"""Numbers that are not finite: nothing swallows them, and check_finite names where they began."""

import copy

import pytest
import torch
from torch.distributed import get_world_size

from nemo_dsv4_cp.checks.finite import FiniteCheck
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from tests.parity import GroupMesh, cpu_backend, randomise, tiny_config

RATIOS = [0, 4, 128, 4]
LENGTH = 512


def poisoned_job(group, rank, options, where, value):
    """Run a model whose module ``where`` yields ``value`` for one token of the first rank."""
    config = tiny_config(RATIOS, context_parallel=options)
    model = DeepseekV4ContextParallelForCausalLM(config, backend=cpu_backend())
    model.initialize_weights(torch.device("cpu"), torch.float32)
    randomise(model, 0)
    token = LENGTH // get_world_size(group) - 40

    def poison(module, args, output):
        if rank == 0:
            output = output.clone()
            output[:, token] = value
        return output

    handle = model.get_submodule(where).register_forward_hook(poison, prepend=True)
    ids = torch.randint(0, 97, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    sharder = model.prepare_model_inputs_for_cp({})["cp_sharder"]
    batch = {"input_ids": ids, "labels": ids}
    _, batch, _ = sharder.shard_batch(GroupMesh(group), None, batch)
    labels = batch.pop("labels")
    try:
        logits = model(**batch).logits
    except FloatingPointError as error:
        handle.remove()
        model(**batch)  # the next forward begins anew
        return str(error)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    finite = logits.isfinite().all(-1)[0]
    return bool(loss.isfinite()), int(finite.long().argmin()) if not finite.all() else None


@pytest.mark.parametrize("balance", ["on", "off"])
@pytest.mark.parametrize(
    "where",
    [
        "model.embed_tokens",
        *(f"model.layers.{layer}.self_attn.wkv" for layer in range(3)),
        "model.layers.2.self_attn.compressor.wkv",
        "model.layers.1.self_attn.wq_a",
    ],
)
def test_what_is_not_finite_reaches_the_loss(ranks, where, balance):
    (finite, first), (finite_after, first_after) = ranks.run(
        poisoned_job, 2, {"balance": balance}, where, float("nan")
    )
    # Or earlier: weights of 0 make no number of what is none.
    assert not finite and first <= LENGTH // 2 - 1
    assert not finite_after and first_after == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["model.embed_tokens", "model.layers.2.self_attn.wkv"])
def test_the_first_layer_rank_and_tensor_are_named_on_all_ranks(ranks, where, value):
    for error in ranks.run(poisoned_job, 2, {"check_finite": True}, where, value):
        assert f"the output of {where} on CP rank 0 of 2 is the first" in error


@pytest.mark.parametrize("part", ["wkv", "wq_b", "weights_proj"])
def test_an_indexer_that_trains_is_watched_too(ranks, part):
    where = f"model.layers.1.self_attn.compressor.indexer.{part}"
    options = {"check_finite": True, "indexer_loss": {"coefficient": 0.1}}
    for error in ranks.run(poisoned_job, 2, options, where, float("nan")):
        assert f"the output of {where} on CP rank 0 of 2 is the first" in error


def test_a_recomputation_and_whole_numbers_are_not_looked_at():
    model = torch.nn.Sequential(torch.nn.Embedding(4, 4), torch.nn.Linear(4, 4))
    check = FiniteCheck(model)
    out = torch.utils.checkpoint.checkpoint(model, torch.tensor([1, 2]), use_reentrant=False)
    assert [name for name, _ in check._outputs] == ["0", "1", "the model"]
    out.sum().backward()
    assert len(check._outputs) == 3
    check.raise_on_all_ranks(None)
    assert check._outputs == []


def test_a_copy_of_a_model_as_a_pipeline_stage_is_has_a_check_of_its_own():
    model = torch.nn.Linear(2, 2)
    model.check = FiniteCheck(model)
    stage = copy.deepcopy(model)
    stage(torch.full((2,), float("nan")))
    assert model.check._outputs == []
    with pytest.raises(FloatingPointError, match="the output of the model on CP rank 0"):
        stage.check.raise_on_all_ranks(None)
