# SPDX-License-Identifier: Apache-2.0
"""The INFO block of the first batch: what runs, on rank 0 alone, once."""

import logging

import torch

from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from tests.parity import GroupMesh, cpu_backend, tiny_config

LOGGER = "nemo_dsv4_cp.startup"


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines += record.getMessage().splitlines()


def logged(model, *batches):
    """Return the lines that forwards in training log."""
    logger, lines = logging.getLogger(LOGGER), Lines()
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        for batch in batches:
            model(**batch)
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
    return lines.lines


def build(**options):
    config = tiny_config([0, 4, 128], context_parallel=options)
    model = DeepseekV4ContextParallelForCausalLM(config, backend=cpu_backend())
    model.initialize_weights(torch.device("cpu"), torch.float32)
    return model.train()


def first_batches_job(group, rank):
    model = build(balance="on")
    ids = torch.arange(300)[None] % 97
    sharder = model.prepare_model_inputs_for_cp({})["cp_sharder"]
    batch = {"input_ids": ids, "labels": ids}
    _, batch, _ = sharder.shard_batch(GroupMesh(group), None, batch)
    batch.pop("labels")
    return logged(model, batch, batch)


def test_rank_0_logs_what_runs_under_cp_once(ranks):
    lines, silence = ranks.run(first_batches_job, 2)
    assert silence == []
    assert lines[0].startswith("Context parallelism (nemo-dsv4-cp ")
    assert lines[1:-1] == [
        "- cp_size: 2",
        "- transport: boundary, collectives overlapped with compute",
        "- kernels: torch",
        "- load balancing (on): ratio 4 on, ratio 128 on",
        "- first batch: 1 x 256 local tokens, one document per row, rows of 300 padded to 512 "
        "tokens (shards: multiple of 128)",
        "- loss: from logits [1, 256, 97], 0 MiB in float32; ChunkedCrossEntropy needs none",
    ]
    assert lines[-1].startswith("- patched: ")
    assert lines[-1].endswith(" functions of AutoModel and others (names at DEBUG)")


def test_a_loss_of_hidden_states_and_packed_rows_are_named():
    packed = {"qkv_format": "thd", "seq_lens": torch.tensor([[40, 24]])}
    batch = {"input_ids": torch.ones(1, 64, dtype=torch.long), "logits_to_keep": 1} | packed
    lines = logged(build(), batch)
    assert "- transport: none" in lines
    assert "- load balancing (auto): none" in lines
    assert "- first batch: 1 x 64 local tokens, packed, not padded" in lines
    assert "- loss: from hidden states, without logits of all positions" in lines


def test_evaluation_logs_nothing():
    assert logged(build().eval(), {"input_ids": torch.ones(1, 8, dtype=torch.long)}) == []
