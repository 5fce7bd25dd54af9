# SPDX-License-Identifier: Apache-2.0
"""What a process holds after many steps is what it held after a few; `make test-soak` takes 500."""

import torch
from torch.nn.functional import cross_entropy

from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from nemo_dsv4_cp.tools.verification import packed_batch
from tests.held import Held, forget_layouts
from tests.parity import GroupMesh, cpu_backend, randomise, tiny_config

MICROBATCHES = [[[130]], [[60, 3, 70], [133]], [[257]], [[1, 90], [50, 40]]]
"""Lengths of the documents of each row: one document a row, or packed."""
ROUNDS = 3


def _batch(documents):
    length = max(map(sum, documents))
    if max(map(len, documents)) > 1:
        return packed_batch(documents, length, 0, 97)
    ids = torch.randint(0, 97, (len(documents), length))
    return {"input_ids": ids, "labels": ids}


def steps_job(group, rank, options):
    """Train for some rounds of every kind of batch; count what is held after each."""
    torch.manual_seed(0)  # all ranks draw the same batches, whatever jobs they ran before
    config = tiny_config([0, 4, 128], context_parallel=options)
    model = DeepseekV4ContextParallelForCausalLM(config, backend=cpu_backend())
    model.initialize_weights(torch.device("cpu"), torch.float32)
    randomise(model, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." not in name)
    for block in model.model.layers.values():
        forward = block.forward
        block.forward = lambda *args, forward=forward, **kwargs: torch.utils.checkpoint.checkpoint(
            forward, *args, use_reentrant=False, **kwargs
        )
    sharder = model.prepare_model_inputs_for_cp({})["cp_sharder"]
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    held = []
    for _ in range(ROUNDS):
        for documents in MICROBATCHES:
            _, batch, _ = sharder.shard_batch(GroupMesh(group), None, _batch(documents))
            labels = batch.pop("labels")
            logits = model(**batch).logits
            cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum").backward()
        del batch, labels, logits  # gradients of all four batches are summed
        optimizer.step()
        optimizer.zero_grad()
        forget_layouts()
        held.append(Held.now())
    return held


def test_no_step_leaves_anything_behind(ranks):
    for held in ranks.run(steps_job, 2, {"balance": "on", "check_finite": True}):
        first, *later = (each.without_memory() for each in held)
        assert first["top_k_indices"] == first["layouts"] == 0
        assert later == [first] * (ROUNDS - 1)
