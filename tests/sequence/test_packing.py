# SPDX-License-Identifier: Apache-2.0
"""Which documents packed batches describe, and which descriptions are refused."""

import pytest
import torch

from nemo_dsv4_cp.batch import contiguous_shard
from nemo_dsv4_cp.sequence.lengths import packed_padding
from nemo_dsv4_cp.sequence.packing import (
    documents_as_automodel,
    documents_of,
    token_documents,
)
from nemo_dsv4_cp.tools.verification import packed_batch
from tests.meshes import FakeMesh

EXPECTED = [[(0, 3), (4, 2)], [(0, 6)]]


def lengths(*rows):
    return torch.tensor(rows)


@pytest.mark.parametrize(
    "batch",
    [
        {
            "seq_lens": lengths([3, 2], [6, -1000]),
            "seq_lens_padded": lengths([4, 4], [8, -1000]),
        },
        {
            "cu_seqlens": lengths([0, 3, 5], [0, 6, -1000]),
            "cu_seqlens_padded": lengths([0, 4, 8], [0, 8, -1]),
        },
        {"_packed_seq_ids": lengths([1, 1, 1, 0, 2, 2, 0, 0], [5, 5, 5, 5, 5, 5, 0, 0])},
    ],
)
def test_documents_are_read_from_lengths_offsets_or_numbers(batch):
    assert documents_of(batch, 2, 8).spans() == EXPECTED
    batch["input_ids"] = torch.zeros(2, 8)
    numbers = [[1, 1, 1, 0, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]
    assert token_documents(batch).tolist() == numbers
    padding = packed_padding(batch, 2, 8)
    if padding is None:  # numbers per token alone
        assert "_packed_seq_ids" in batch
    else:
        assert torch.equal(padding, torch.tensor(numbers) == 0)


def test_lengths_are_corrected_as_by_automodel_and_empty_documents_counted():
    batch = {
        "seq_lens": lengths([3, 0, 2, -1000], [-7, 8, -1000, -1000]),
        "seq_lens_padded": lengths([1, 2, -1000, -1000], [-1000, -1000, -1000, -1000]),
    }
    expected = [[(0, 3), (3, 0), (5, 2)], [(0, 0), (0, 8)]]
    assert documents_as_automodel(batch, 2, 8).spans() == expected
    assert documents_as_automodel(batch, 1, 8).spans() == expected[:1]
    with pytest.raises(ValueError, match="row 1 overrun it"):
        documents_as_automodel(batch, 2, 7)


def test_rows_of_padding_alone_have_no_document():
    batch = {"_packed_seq_ids": torch.zeros(2, 8).long(), "input_ids": torch.zeros(2, 8)}
    assert documents_of(batch, 2, 8).spans() == [[], []]
    assert not token_documents(batch).any()


def test_documents_of_no_token_are_none():
    batch = {"seq_lens": lengths([3, 0, 2])}
    assert documents_of(batch, 1, 8).spans() == [[(0, 3), (3, 2)]]


def test_a_packed_batch_that_tells_no_documents_is_refused():
    ids = torch.arange(8)[None]
    with pytest.raises(KeyError, match="requires `seq_lens`, `cu_seqlens`"):
        shard({"input_ids": ids, "labels": ids, "qkv_format": "thd"})


def shard(batch, rank=0, size=2, **options):
    return contiguous_shard(FakeMesh(size, rank), None, batch, pad_multiple=128, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_lens": lengths([5, 9])}, r"row 0 overrun it: document 1 ends at token 14 of 12"),
        ({"seq_lens": lengths([5, -3])}, r"row 0 holds the length -3"),
        ({"seq_lens_padded": lengths([4, 5])}, r"document 0 of row 0 has 5 tokens, .* gives it 4"),
        ({"seq_lens": lengths([5, 4], [5, 4])}, r"describes 2 rows, and the batch has 1"),
        ({"cu_seqlens": lengths([0, 5, 3]), "seq_lens": None}, r"does not count up from 0"),
        (
            {"position_ids": torch.arange(12)[None]},
            r"token 5 is at position 0 of its document, and position_ids give it 5",
        ),
        ({"labels": torch.zeros(1, 12).long()}, r"token 9 of row 0 has a label and belongs to no"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank_alike(change, message):
    for rank in range(2):
        batch = packed_batch([[5, 4]], 12, seed=0, vocab=97) | {"seq_lens_padded": None} | change
        with pytest.raises(ValueError, match=message):
            shard(batch, rank)


def test_rows_are_laid_out_end_to_end_and_every_token_tensor_with_them():
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 99, 4, 5, 99, 99]]),
        "labels": torch.tensor([[2, 3, 9, -100, 5, 9, -100, -100]]),
        "advantages": torch.arange(8.0)[None],
        "seq_lens": lengths([3, 2]),
        "seq_lens_padded": lengths([4, 4]),
        "qkv_format": "thd",
    }
    _, cut, facts = shard(batch, padding_token_id=7)
    assert facts.padded_seq_len == 16  # 2 ranks of 8
    assert cut["input_ids"].tolist() == [[1, 2, 3, 4, 5, 7, 7, 7]]
    assert cut["labels"].tolist() == [[2, 3, 9, 5, 9, -100, -100, -100]]
    assert cut["advantages"].tolist() == [[0, 1, 2, 4, 5, 0, 0, 0]]
    assert cut["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert cut["padding_mask"].tolist() == [[False] * 5 + [True] * 3]
    assert cut["seq_lens"].tolist() == cut["seq_lens_padded"].tolist() == [[3, 2]]
    assert facts.input_token_stream_positions.tolist() == [[0, 1, 2, -1, 3, 4, -1, -1]]


def test_tokens_computed_are_the_tokens_there_are_and_a_hundredth_more_at_most(record_property):
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(100, 901, (40,), generator=generator).tolist()
    while sum(documents) > 16384:  # 40 documents that fit their row
        documents[documents.index(max(documents))] -= 50
    real = sum(documents)
    computed = {}
    for pad_documents in (False, True):
        batch = packed_batch([documents], 16384, seed=0, vocab=97)
        _, _, facts = shard(batch, size=8, pad_documents=pad_documents)
        computed[pad_documents] = facts.padded_seq_len
    print(f"{real} real tokens on 8 ranks: computed {computed[False]}; AutoModel {computed[True]}")
    record_property("computed over real", computed[False] / real)
    record_property("AutoModel: computed over real", computed[True] / real)
    assert computed[False] / real <= 1.01
    assert computed[True] / real > 1.1
