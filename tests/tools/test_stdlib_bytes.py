# SPDX-License-Identifier: Apache-2.0
import sysconfig
from pathlib import Path

import pytest
import torch
from nemo_automodel.components.datasets.loader import DataloaderConfig, make_dataset_config
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

from nemo_dsv4_cp.tools.stdlib_bytes import StandardLibraryBytes

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def batches(batch_size: int, **fields):
    """What AutoModel makes of a `dataset:` node, without a tokenizer."""
    dataset = make_dataset_config(StandardLibraryBytes, fields)
    config = DataloaderConfig(dataset_config=dataset, batch_size=batch_size, shuffle=False)
    return list(config.build(dp_rank=0, dp_world_size=1))


def test_samples_are_the_files_in_order_of_their_names():
    dataset = StandardLibraryBytes(seq_length=100, num_samples=500)
    expected = b"".join(path.read_bytes() for path in sorted(STDLIB.glob("*.py")))[: 100 * 500]
    served = [token for index in range(len(dataset)) for token in dataset[index]["input_ids"]]
    assert bytes(served) == expected


def test_a_label_is_the_next_token_across_samples_too():
    samples = list(StandardLibraryBytes(seq_length=37, num_samples=50))
    ids = [token for sample in samples for token in sample["input_ids"]]
    labels = [label for sample in samples for label in sample["labels"]]
    assert len(labels) == len(ids) == 37 * 50
    assert labels[:-1] == ids[1:]


def test_without_num_samples_all_whole_samples_are_served():
    size = sum(path.stat().st_size for path in STDLIB.glob("*.py"))
    dataset = StandardLibraryBytes(seq_length=2000)
    assert len(dataset) == (size - 1) // 2000
    assert len(dataset[len(dataset) - 1]["labels"]) == 2000


def test_automodels_loader_needs_no_tokenizer_and_finds_no_padding():
    (first, second) = batches(2, seq_length=300, num_samples=4)
    for batch in (first, second):
        assert batch["input_ids"].shape == batch["labels"].shape == (2, 300)
        assert batch["input_ids"].dtype == torch.int64
        assert batch["input_ids"].max() < 256
        assert batch["attention_mask"].all()
        assert not batch["padding_mask"].any()
    assert not torch.equal(first["input_ids"], second["input_ids"])


def test_automodels_loss_is_zero_for_logits_that_know_the_next_byte():
    (batch,) = batches(1, seq_length=200, num_samples=1)
    next_byte = torch.nn.functional.one_hot(batch["input_ids"][:, 1:], 256).float() * 1e4
    loss = MaskedCrossEntropy()(next_byte, batch["labels"][:, :-1])
    assert loss == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seq_length": 0}, "seq_length=0 must be at least 1"),
        ({"seq_length": 10**9}, "too few for one sample of dataset.seq_length=1000000000"),
        ({"seq_length": 10, "num_samples": 0}, "num_samples=0 is not between 1 and"),
        ({"seq_length": 10, "num_samples": 10**9}, "num_samples=1000000000 is not between 1 and"),
    ],
)
def test_a_size_that_cannot_be_served_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        StandardLibraryBytes(**fields)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_sample_beyond_num_samples_is_an_index_error(index):
    with pytest.raises(IndexError):
        StandardLibraryBytes(seq_length=10, num_samples=3)[index]


def test_samples_of_every_length_for_packing():
    served = StandardLibraryBytes(40, 400, shortest=10)
    lengths = [len(served[i]["input_ids"]) for i in range(400)]
    assert set(lengths) == set(range(10, 41))
    whole = StandardLibraryBytes(40, 400)
    assert served[7]["labels"] == whole[7]["labels"][: lengths[7]]
    with pytest.raises(ValueError, match=r"dataset.shortest=41 .* dataset.seq_length=40"):
        StandardLibraryBytes(40, shortest=41)
