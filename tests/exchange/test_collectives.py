# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.distributed as dist

from nemo_dsv4_cp.exchange import collectives
from nemo_dsv4_cp.exchange.collectives import (
    all_gather_metadata,
    cp_enabled,
    cp_rank,
    cp_size,
    texts_if_different,
)
from nemo_dsv4_cp.exchange.gather import all_gather


def gather_job(group, rank, dim, dtype):
    size = dist.get_world_size(group)
    shards = torch.randn(size, 2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = torch.randn(size, *torch.cat(list(shards), dim).shape).to(dtype)
    dist.broadcast(weights, 0, group=group)
    mine = shards[rank].clone().requires_grad_()
    gathered = all_gather(mine, dim=dim, cp_group=group)
    (gathered * weights[rank]).sum().backward()

    every = shards.clone().requires_grad_()
    whole = torch.cat(list(every), dim)
    (whole * weights.sum(0)).sum().backward()
    flags = all_gather_metadata(torch.tensor([rank > 0]), dim=0, cp_group=group)
    return {
        "values": torch.equal(gathered, whole),
        "gradient": torch.allclose(
            mine.grad, every.grad[rank], atol=0.05 if dtype.itemsize < 4 else 1e-6
        ),
        "metadata": flags.tolist() == [other > 0 for other in range(size)],
        "identity": (cp_enabled(group), cp_rank(group), cp_size(group)) == (size > 1, rank, size),
    }


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_gather_concatenates_in_rank_order_and_returns_gradients_to_owners(
    ranks, size, dim, dtype
):
    for answers in ranks.run(gather_job, size, dim, dtype):
        assert all(answers.values()), answers


def rounding_job(group, rank, dtype):
    """Gather, and return a gradient's error in units of one rounding of its sum."""
    size = dist.get_world_size(group)
    # Each sum is 1 and 7 terms that vanish one by one beside it, in whatever order.
    terms = torch.full((size, size * 64), 0.4 * torch.finfo(dtype).eps).to(dtype)
    terms[torch.arange(size * 64) % size, torch.arange(size * 64)] = 1
    mine = torch.zeros(64, dtype=dtype, requires_grad=True)
    gathered = all_gather(mine, dim=0, cp_group=group)
    gathered.backward(terms[rank])
    exact = terms.double().sum(0)[rank * 64 : (rank + 1) * 64]
    return float(((mine.grad.double() - exact).abs() / (exact * torch.finfo(dtype).eps / 2)).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_in_two_bytes_is_rounded_once_whatever_the_number_of_ranks(ranks, dtype):
    assert max(ranks.run(rounding_job, 8, dtype)) <= 1


def second_order_job(group, rank):
    """Return whether a gradient refuses to be differentiated again, and is not left out."""
    mine = torch.ones(2, requires_grad=True)
    gathered = all_gather(mine, dim=0, cp_group=group)
    (grad,) = torch.autograd.grad((gathered * gathered).sum(), mine, create_graph=True)
    try:
        (grad.sum() + mine.sum()).backward()
    except RuntimeError as error:
        return "once_differentiable" in str(error)
    return False


def test_a_second_derivative_is_refused_instead_of_left_out(ranks):
    assert ranks.run(second_order_job, 2) == [True, True]


def no_communication_job(group, rank):
    tensor = torch.ones(2)
    return all_gather(tensor, dim=0, cp_group=group) is tensor


def test_a_group_of_one_communicates_nothing(ranks):
    assert ranks.run(no_communication_job, 1) == [True]


def texts_job(group, rank, texts):
    return texts_if_different(texts[rank], group)


def test_texts_are_exchanged_if_they_differ_whatever_their_length(ranks):
    assert ranks.run(texts_job, 3, ["é" * 999] * 3) == [None] * 3
    texts = ["", "é" * 999, "a"]
    assert ranks.run(texts_job, 3, texts) == [dict(enumerate(texts))] * 3
    assert ranks.run(texts_job, 1, texts) == [None]


@pytest.mark.parametrize(
    ("backends", "device"), [("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "cuda:3")]
)
def test_what_is_compared_lies_where_the_backend_moves_it(monkeypatch, backends, device):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert collectives._device(None) == torch.device(device)
