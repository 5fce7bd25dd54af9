# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from nemo_automodel.components.distributed.context_parallel.sharder import contiguous_local_indices

from nemo_dsv4_cp.batch import contiguous_shard, local_token_indices
from tests.meshes import FakeMesh


@pytest.mark.parametrize("rank", range(3))
def test_local_indices_are_automodel(rank):
    mesh = FakeMesh(3, rank)
    assert torch.equal(local_token_indices(mesh, 24), contiguous_local_indices(mesh, 24))


def test_the_shard_layout_holds_the_lengths_before_and_after_padding():
    batch = {"input_ids": torch.ones(1, 300).long(), "labels": torch.ones(1, 300).long()}
    _, cut, facts = contiguous_shard(FakeMesh(2), None, batch, pad_multiple=128)
    assert (facts.original_seq_len, facts.padded_seq_len) == (300, 512)
    assert cut["input_ids"].shape == (1, 256)


def test_one_rank_reports_an_unpadded_layout_and_marks_packed_rows():
    batch = {"input_ids": torch.ones(1, 300).long(), "seq_lens": torch.tensor([[300]])}
    _, uncut, facts = contiguous_shard(None, None, batch, pad_multiple=128)
    assert (facts.original_seq_len, facts.padded_seq_len) == (300, 300)
    assert uncut["qkv_format"] == "thd"


@pytest.mark.parametrize("positions", [[0, 1, 0, 1], [1, 2, 3, 4], [0, 2, 4, 6]])
def test_positions_that_do_not_count_along_the_row_are_refused(positions):
    batch = {
        "input_ids": torch.ones(1, 4).long(),
        "labels": torch.ones(1, 4).long(),
        "position_ids": torch.tensor([positions]),
    }
    with pytest.raises(ValueError, match="give the documents' lengths as seq_lens"):
        contiguous_shard(FakeMesh(2), None, batch)


def test_positions_of_pad_tokens_do_not_matter():
    batch = {
        "input_ids": torch.ones(1, 4).long(),
        "labels": torch.ones(1, 4).long(),
        "attention_mask": torch.tensor([[1, 1, 0, 0]]),
        "position_ids": torch.tensor([[0, 1, 1, 1]]),
    }
    _, cut, _ = contiguous_shard(FakeMesh(2, 1), None, batch)
    assert cut["position_ids"].tolist() == [[1, 1]]


def shards(batch):
    """What both of two ranks keep."""
    return [contiguous_shard(FakeMesh(2, rank), None, dict(batch))[1] for rank in (0, 1)]


def batch_of(seq_len):
    ids = torch.arange(seq_len)[None]
    return {"input_ids": ids, "labels": ids}


def test_added_padding_is_marked_for_the_routers():
    marked = torch.cat([cut["padding_mask"] for cut in shards(batch_of(5))], dim=1)
    assert marked.tolist() == [[False] * 5 + [True] * 3]
    assert all("padding_mask" not in cut for cut in shards(batch_of(8)))


def test_extra_per_token_keys_are_cut_by_shape_or_by_declaration():
    ids = torch.arange(12).view(2, 6)
    _, batch = shards(
        {
            "input_ids": ids,
            "labels": ids,
            "advantages": torch.ones(2, 6),
            "teacher_logits": torch.ones(2, 6, 5),
            "groups": ids[0],
            "sample_weight": torch.ones(2),
            "_cp_metadata_seq_dims": {"groups": 0},
            "_cp_metadata_pad_values": {"groups": -7, "advantages": 0.5},
        }
    )
    assert batch["advantages"].tolist() == [[1.0, 1.0, 0.5, 0.5]] * 2
    assert batch["teacher_logits"].shape == (2, 4, 5)
    assert batch["groups"].tolist() == [4, 5, -7, -7]
    assert batch["sample_weight"].shape == (2,)
    assert not [key for key in batch if key.startswith("_cp_metadata")]


def test_images_are_refused_with_the_setting_to_change():
    batch = batch_of(8) | {"pixel_values": torch.ones(1, 3)}
    with pytest.raises(NotImplementedError, match=r"pixel_values.*cp_size: 1"):
        shards(batch)


@pytest.mark.parametrize("mask", [[0, 1, 1, 1], [1, 0, 1, 0]])
def test_padding_before_a_real_token_is_refused(mask):
    batch = batch_of(4) | {"attention_mask": torch.tensor([mask])}
    with pytest.raises(ValueError, match=r"row 0 .* padding_side"):
        shards(batch)
