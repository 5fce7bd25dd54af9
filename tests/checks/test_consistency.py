# SPDX-License-Identifier: Apache-2.0
"""Ranks that disagree, over real gloo ranks: all refuse, and the error names what."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from nemo_dsv4_cp import ContextParallelOptions
from nemo_dsv4_cp.checks import consistency
from nemo_dsv4_cp.exchange import collectives
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from nemo_dsv4_cp.tools.verification import packed_batch
from tests.parity import GroupMesh, cpu_backend, tiny_config


def build(ratios=(4,), options=None, **fields):
    config = tiny_config(list(ratios), context_parallel=options, **fields)
    return DeepseekV4ContextParallelForCausalLM(config, backend=cpu_backend())


def first_step(model, group, documents=((8, 8),), **changes):
    """Cut a batch with the model's own sharder, and return what is raised."""
    batch = packed_batch([list(row) for row in documents], 16, seed=0, vocab=97) | changes
    sharder = model.prepare_model_inputs_for_cp({})["cp_sharder"]
    try:
        sharder.shard_batch(GroupMesh(group), None, batch)
    except ValueError as error:
        return str(error)
    return None


def option_job(group, rank, name):
    model = build()
    if rank == 1:  # whatever it means: options to come are compared as well
        object.__setattr__(model.config.context_parallel, name, "another")
    return first_step(model, group)


@pytest.mark.parametrize(
    "name", [option.name for option in dataclasses.fields(ContextParallelOptions)]
)
def test_any_option_that_differs_is_named_with_its_values(ranks, name):
    for refusal in ranks.run(option_job, 3, name):
        assert f"context_parallel.{name} is " in refusal
        assert 'on rank 0, 2 and "another" on rank 1; start all of them with one recipe' in refusal


def test_an_option_that_one_rank_does_not_know_is_named(ranks):
    for refusal in ranks.run(option_job, 2, "yet_to_come"):
        assert 'context_parallel.yet_to_come is absent on rank 0 and "another" on rank 1' in refusal


def recipe_job(group, rank, options, fields):
    return first_step(build(options=options, **fields) if rank == 1 else build(), group)


@pytest.mark.parametrize(
    ("options", "fields", "named"),
    [
        ({"transport": "all_gather"}, {}, "context_parallel.transport"),
        ({"kernels": "torch"}, {}, "context_parallel.kernels"),
        ({"pad_multiple": 16}, {}, "context_parallel.pad_multiple"),
        ({"pad_documents": True}, {}, "context_parallel.pad_documents"),
        ({"compare_ranks": "never"}, {}, "context_parallel.compare_ranks"),
        ({"compare_ranks": "every"}, {}, "context_parallel.compare_ranks"),
        ({}, {"ratios": (0,)}, "model.config.compress_ratios is [4] on rank 0 and [0] on rank 1"),
        ({}, {"ratios": (4, 4)}, "model.config.num_hidden_layers is 1 on rank 0 and 2 on rank 1"),
        ({}, {"sliding_window": 64}, "model.config.sliding_window is 128 on rank 0 and 64"),
        ({}, {"hidden_size": 128}, "model.config.hidden_size is 64 on rank 0 and 128 on rank 1"),
        ({}, {"index_topk": 8}, "model.config.index_topk is 24 on rank 0 and 8 on rank 1"),
        ({}, {"torch_dtype": "bfloat16"}, "model.config.dtype is "),
        ({}, {"max_position_embeddings": 8}, "model.config.max_position_embeddings is 8192"),
    ],
)
def test_another_recipe_on_one_rank_is_refused_on_all(ranks, options, fields, named):
    for refusal in ranks.run(recipe_job, 2, options, fields):
        assert refusal.startswith("the ranks of one model have different settings: ")
        assert named in refusal


def release_job(group, rank, distribution):
    installed = consistency.version
    if rank == 1:
        consistency.version = lambda name: "9.9" if name == distribution else installed(name)
    try:
        return first_step(build(), group)
    finally:
        consistency.version = installed


@pytest.mark.parametrize("distribution", ["nemo-dsv4-cp", "nemo_automodel"])
def test_another_release_on_one_rank_is_refused_on_all(ranks, distribution):
    for refusal in ranks.run(release_job, 2, distribution):
        assert f"{distribution} is " in refusal
        assert '"9.9" on rank 1' in refusal


def trained_job(group, rank):
    model = build()
    if rank == 1:
        model.lm_head.requires_grad_(False)
    return first_step(model, group)


def test_weights_that_one_rank_does_not_train_are_named(ranks):
    for refusal in ranks.run(trained_job, 2):
        assert "parameters is " in refusal


def place_job(group, rank):
    model = build()
    model.config.name_or_path = f"/node/{rank}"
    return first_step(model, group)


def test_where_a_rank_found_its_config_may_differ(ranks):
    assert ranks.run(place_job, 2) == [None, None]


def sharded_job(group, rank):
    """Initialise an FSDP2 model of other layers, which AutoModel would count by collectives."""
    with torch.device("meta"):
        model = build((4, 4) if rank == 1 else (4,))
    mesh = DeviceMesh.from_group(group, "cpu")
    for block in model.model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    try:
        model.initialize_weights(torch.device("cpu"), torch.float32)
    except ValueError as error:
        return str(error)
    return None


def test_sharded_models_of_other_sizes_are_refused_before_the_first_step(ranks):
    for refusal in ranks.run(sharded_job, 2):
        assert "model.config.num_hidden_layers is 1 on rank 0 and 2 on rank 1" in refusal


def counting_job(group, rank, compare):
    """Return how many collectives each of three steps takes, and how many bytes each sends."""
    sent = []
    gather, gather_texts = collectives.all_gather_single, dist.all_gather_object

    def counted(output, tensor, **options):
        sent.append(tensor.nbytes)
        return gather(output, tensor, **options)

    def counted_texts(found, text, group):
        sent.append(text)
        return gather_texts(found, text, group=group)

    collectives.all_gather_single, dist.all_gather_object = counted, counted_texts
    try:
        model, steps = build(options={"compare_ranks": compare}), []
        for _ in range(3):
            sent.clear()
            assert first_step(model, group) is None
            steps.append(list(sent))
        return steps
    finally:
        collectives.all_gather_single, dist.all_gather_object = gather, gather_texts


@pytest.mark.parametrize(
    ("compare", "steps"),
    [("never", [[8], [], []]), ("first", [[8, 8], [], []]), ("every", [[8, 8], [8], [8]])],
)
def test_to_compare_costs_a_number_of_each_rank(ranks, compare, steps):
    assert ranks.run(counting_job, 2, compare) == [steps] * 2


def alone_job(group, rank, compare, step):
    model = build(options={"compare_ranks": compare})
    for _ in range(step):
        assert first_step(model, group) is None
    return first_step(model, group, **({"qkv_format": "sbhd"} if rank == 1 else {}))


@pytest.mark.parametrize(("compare", "step"), [("first", 0), ("every", 2)])
def test_what_one_rank_alone_refuses_is_refused_on_all(ranks, compare, step):
    first, second, third = ranks.run(alone_job, 3, compare, step)
    assert second.startswith("qkv_format='sbhd' is another layout")
    assert (
        first
        == third
        == (f"rank 1 of this CP group refuses its batch, so that all do: ValueError: {second}")
    )


def batch_job(group, rank, key, spoil):
    batch = packed_batch([[8, 8]], 16, seed=0, vocab=97)
    tensor = batch[key].clone()
    if rank == 1:
        tensor[0, spoil], tensor[0, spoil + 1] = tensor[0, spoil + 1].clone(), tensor[0, spoil]
    return first_step(build(), group, **{key: tensor})


@pytest.mark.parametrize("key", ["input_ids", "labels"])
def test_batches_of_other_tokens_are_refused_though_their_sizes_are_equal(ranks, key):
    for refusal in ranks.run(batch_job, 2, key, 3):
        assert refusal.startswith("the ranks of one CP group hold different batches: ")
        assert f"the checksum of {key} is " in refusal
        assert "every CP rank must load the same samples" in refusal
