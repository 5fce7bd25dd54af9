# SPDX-License-Identifier: Apache-2.0
"""Sharding a batch waits for its device once, whatever is in the batch."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_dsv4_cp.batch import contiguous_shard
from nemo_dsv4_cp.checks import batch_rules, consistency
from nemo_dsv4_cp.sequence import packing
from tests.meshes import FakeMesh

ROW = {
    "input_ids": torch.ones(2, 12).long(),
    "labels": torch.ones(2, 12).long(),
    "loss_mask": torch.ones(2, 12),
    "position_ids": torch.arange(12).repeat(2, 1),
    "vision_token_types": torch.full((2, 12), -1),
}
LENGTHS = torch.tensor([[5, 7], [12, -1000]])
PACKED = ROW | {"seq_lens": LENGTHS, "seq_lens_padded": LENGTHS}
MASKS = (torch.ones(2, 12).long(), torch.zeros(2, 1, 12, 12), torch.ones(2, 1, 12, 12).bool())


@pytest.mark.parametrize(
    "batch",
    [ROW, PACKED, PACKED | {"_packed_seq_ids": torch.ones(2, 12).long()}]
    + [ROW | {"attention_mask": mask} for mask in MASKS],
)
def test_a_batch_is_sharded_with_one_wait(monkeypatch, batch):
    """Fake tensors raise for every wait, except in the one function that is replaced."""
    reads = []

    def read(tensors):
        """Return that no rule is broken, and what describes documents."""
        reads.append(len(tensors))
        numbers = torch.tensor([[1] * 5 + [2] * 7, [1] * 12])
        known = {(2, 2): LENGTHS, (2, 12): numbers}
        return [known.get(tuple(tensor.shape), torch.zeros(())) for tensor in tensors]

    for module in (packing, batch_rules, consistency):
        monkeypatch.setattr(module, "on_cpu_together", read)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = {key: mode.from_tensor(tensor) for key, tensor in batch.items()}
    _, cut, _ = contiguous_shard(FakeMesh(2), None, fake, vocab_size=97)
    assert len(reads) == 1
    assert cut["labels"].shape == (2, 8 if "seq_lens" in batch else 6)


def test_checksums_of_a_batch_are_read_in_one_wait(monkeypatch):
    reads = []
    monkeypatch.setattr(consistency, "on_cpu_together", lambda ts: reads.append(ts) or ts)
    consistency.facts_of({"input_ids": ROW["input_ids"], "labels": ROW["labels"]}, None)
    assert len(reads) == 1
