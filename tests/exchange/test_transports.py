# SPDX-License-Identifier: Apache-2.0
"""What every transport must answer, over real gloo ranks."""

import pytest
import torch
from torch.distributed import get_world_size

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.row_plan import RowPlan

TRANSPORTS = ["all_gather", "boundary"]


def wanted_by(rank, size, local_len, before):
    """Ask for the tokens before the shard and in it, and for some of another rank's."""
    start = rank * local_len
    other = (size - 1 - rank) * local_len
    return (
        range(start - before, start + local_len),
        range(other + local_len // 2, other + local_len),
    )


def context_job(group, rank, name, local_len, tokens, overlap):
    size = get_world_size(group)
    layout = SequenceLayout(local_len, rank, size)
    transport = plugins.load(plugins.TRANSPORTS, name)(group, overlap=overlap)
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    whole = [
        torch.randn(2, size * local_len, 3 + i, generator=generator).to(dtypes[i]) for i in range(3)
    ]
    mine = [
        w[:, layout.start : layout.end].clone().requires_grad_(i < 2) for i, w in enumerate(whole)
    ]
    shards = tuple((layout.shard(r),) for r in range(size))
    wanted = [
        tuple(wanted_by(r, size, local_len, before) for r in range(size)) for before in tokens
    ]
    plans = {
        str(i): RowPlan.of(asked, shards, rank=rank, device=torch.device("cpu"))
        for i, asked in enumerate(wanted)
    }
    fetched = transport.fetch({str(i): tensor for i, tensor in enumerate(mine)}, plans).wait()
    answers = [fetched[str(i)] for i in range(len(mine))]

    told, loss = {}, torch.zeros(())
    for i, (rows, before) in enumerate(zip(answers, tokens, strict=True)):
        asked = torch.tensor([t for run in wanted_by(rank, size, local_len, before) for t in run])
        expected = whole[i][:, asked.clamp(min=0)] * (asked >= 0)[:, None].to(dtypes[i])
        told[f"rows {i}"] = torch.equal(rows, expected)
        told[f"needs gradient {i}"] = rows.requires_grad == (i < 2)
        if i < 2:
            weight = torch.arange(rows.shape[1])[None, :, None] + 1.0
            loss = loss + (rows.float() * weight * (rank + 1)).sum()
    loss.backward()
    for i, before in enumerate(tokens[:2]):
        owed = torch.zeros(local_len)
        for reader in range(size):
            row = 0
            for run in wanted_by(reader, size, local_len, before):
                for token in run:
                    row += 1
                    if layout.start <= token < layout.end:
                        owed[token - layout.start] += row * (reader + 1)
        got = mine[i].grad[0, :, 0].float()
        told[f"gradient {i}"] = torch.allclose(got, owed, rtol=0.02 if i else 1e-6)
    return told


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("local_len", "tokens", "overlap"),
    [(8, [3, 8, 4], True), (4, [11, 0, 4], False), (2, [9, 2, 1], True)],
)
def test_wanted_tokens_come_from_their_owners_and_gradients_return(
    ranks, name, size, local_len, tokens, overlap
):
    for answers in ranks.run(context_job, size, name, local_len, tokens, overlap):
        assert all(answers.values()), answers


def entries_job(group, rank, name):
    transport = plugins.load(plugins.TRANSPORTS, name)(group, overlap=True)
    return transport.gather(torch.full((1, 2, 1), float(rank))).wait().flatten().tolist()


@pytest.mark.parametrize("name", TRANSPORTS)
def test_entries_arrive_in_window_order(ranks, name):
    for answer in ranks.run(entries_job, 3, name):
        assert answer == [0, 0, 1, 1, 2, 2]
