import pytest
import torch
from nemo_automodel.components.distributed.context_parallel.sharder import contiguous_local_indices

from nemo_dsv4_cp.batch import contiguous_shard, local_token_indices
from tests.meshes import FakeMesh


@pytest.mark.parametrize("rank", range(3))
def test_local_indices_are_the_hosts(rank):
    mesh = FakeMesh(3, rank)
    assert torch.equal(local_token_indices(mesh, 24), contiguous_local_indices(mesh, 24))


def test_the_shard_layout_tells_the_lengths_before_and_after_padding():
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
    with pytest.raises(ValueError, match="tell the documents' lengths with seq_lens"):
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
