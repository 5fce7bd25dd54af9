"""What every transport must answer, over real gloo ranks."""

import pytest
import torch
from torch.distributed import get_world_size

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.sequence.layout import SequenceLayout

TRANSPORTS = ["all_gather", "boundary"]


def context_job(group, rank, name, local_len, tokens):
    size = get_world_size(group)
    layout = SequenceLayout(local_len, rank, size)
    transport = plugins.load(plugins.TRANSPORTS, name)(group, layout)
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    whole = [
        torch.randn(2, size * local_len, 3 + i, generator=generator).to(dtypes[i]) for i in range(3)
    ]
    own = slice(layout.start, layout.end)
    mine = [w[:, own].clone().requires_grad_(i < 2) for i, w in enumerate(whole)]
    contexts = transport.left_context(mine, tokens)

    answers = {}
    loss = torch.zeros(())
    for i, (context, before) in enumerate(zip(contexts, tokens, strict=True)):
        rows = context.rows(layout.start - before, layout.end)
        expected = torch.nn.functional.pad(whole[i], (0, 0, before, 0))
        answers[f"rows {i}"] = torch.equal(rows, expected[:, layout.start : layout.end + before])
        answers[f"needs gradient {i}"] = context.tensor.requires_grad == (i < 2)
        if i < 2:
            weight = torch.arange(rows.shape[1])[None, :, None] + 1.0
            loss = loss + (rows.float() * weight * (rank + 1)).sum()
    loss.backward()
    # Token t of rank k is row t - start(r) + before of every rank r that can address it.
    for i, before in enumerate(tokens[:2]):
        owed = torch.zeros(local_len)
        for reader in range(size):
            start = reader * local_len
            for token in range(layout.start, layout.end):
                if start - before <= token < start + local_len:
                    owed[token - layout.start] += (token - start + before + 1) * (reader + 1)
        got = mine[i].grad[0, :, 0].float()
        answers[f"gradient {i}"] = torch.allclose(got, owed, rtol=0.02 if i else 1e-6)
    return answers


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("local_len", "tokens"), [(8, [3, 8, 4]), (4, [11, 0, 4]), (2, [9, 2, 1])])
def test_left_context_comes_from_all_neighbours_it_reaches_and_gradients_return(
    ranks, name, size, local_len, tokens
):
    for answers in ranks.run(context_job, size, name, local_len, tokens):
        assert all(answers.values()), answers


def entries_job(group, rank, name):
    transport = plugins.load(plugins.TRANSPORTS, name)(group, SequenceLayout(8, rank, 3))
    return transport.gather_entries(torch.full((1, 2, 1), float(rank))).flatten().tolist()


@pytest.mark.parametrize("name", TRANSPORTS)
def test_entries_arrive_in_window_order(ranks, name):
    for answer in ranks.run(entries_job, 3, name):
        assert answer == [0, 0, 1, 1, 2, 2]
