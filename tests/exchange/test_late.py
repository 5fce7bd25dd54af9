# SPDX-License-Identifier: Apache-2.0
"""Layers whose collectives bring nothing before they are waited for."""

import pytest
import torch

from tests.exchange.late import late_job
from tests.exchange.test_collectives import gather_job
from tests.packed_parity import packed_attention_job
from tests.parity import assert_parity, attention_job

DOCUMENTS = [[1, 300, 3, 130, 4, 129], [513, 54]]


LAYERS = [
    *((ratio, balance, "wait") for ratio in (4, 128) for balance in ("off", "on")),
    (0, "off", "wait"),
    (4, "on", "start"),
    *(
        pytest.param(*layer, "start", marks=pytest.mark.slow)
        for layer in ((0, "off"), (4, "off"), (128, "off"), (128, "on"))
    ),
]


@pytest.mark.parametrize("transport", ["all_gather", "boundary"])
@pytest.mark.parametrize(("ratio", "balance", "reads"), LAYERS)
def test_a_layer_reads_nothing_that_may_not_be_there(ranks, ratio, balance, transport, reads):
    options = {"transport": transport, "balance": balance}
    for overlap in (True, False) if transport == "boundary" else (True,):
        arguments = (ratio, 2, 500, options | {"overlap": overlap})
        assert_parity(ranks.run(late_job, 3, attention_job, reads, *arguments))


@pytest.mark.parametrize(("ratio", "balance", "reads"), LAYERS)
def test_nor_does_a_layer_of_packed_rows(ranks, ratio, balance, reads):
    arguments = (ratio, DOCUMENTS, {"balance": balance})
    assert_parity(ranks.run(late_job, 3, packed_attention_job, reads, *arguments))


@pytest.mark.parametrize("reads", ["start", "wait"])
def test_nor_does_the_sum_of_gradients_in_two_bytes(ranks, reads):
    for answers in ranks.run(late_job, 3, gather_job, reads, 1, torch.bfloat16):
        assert all(answers.values()), answers
