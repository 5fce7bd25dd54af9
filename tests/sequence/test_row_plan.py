# SPDX-License-Identifier: Apache-2.0
"""Row plans against counting by hand: every rank's part together, without ranks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_dsv4_cp.sequence.row_plan import RowPlan, rows_of
from nemo_dsv4_cp.sequence.transfers import transfers

CPU = torch.device("cpu")


@st.composite
def questions(draw):
    """Draw shards, and of each rank runs of positions that it wants, some before the first."""
    ranks, length = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    total = ranks * length
    wanted = []
    for _ in range(ranks):
        begins = draw(st.lists(st.integers(-3, total - 1), max_size=4))
        wanted.append(tuple(range(b, draw(st.integers(b, total))) for b in begins))
    return ranks, length, tuple(wanted)


@given(questions())
def test_answers_hold_what_is_wanted_and_gradients_return_to_the_owners(question):
    ranks, length, wanted = question
    shards = tuple((range(r * length, (r + 1) * length),) for r in range(ranks))
    plans = [
        RowPlan.of(transfers(wanted, shards, shards, rank=rank), ranks, CPU)
        for rank in range(ranks)
    ]
    whole = torch.arange(1.0, ranks * length + 1)[None, :, None]
    own = [whole[:, r * length : (r + 1) * length].clone().requires_grad_() for r in range(ranks)]
    divided = [plan.divide(tensor) for plan, tensor in zip(plans, own, strict=True)]
    leaving = [
        leaves.split(plan.leaving_counts, dim=1)
        for plan, (_, leaves) in zip(plans, divided, strict=True)
    ]
    loss = torch.zeros(())
    for rank, plan in enumerate(plans):
        arriving = torch.cat([leaving[sender][rank] for sender in range(ranks)], dim=1)
        assert plan.arriving_counts == tuple(leaving[s][rank].shape[1] for s in range(ranks))
        answer = plan.answer(divided[rank][0], arriving if plan.moves else None)
        asked = [token for run in wanted[rank] for token in run]
        assert answer.flatten().tolist() == [max(token + 1, 0) for token in asked]
        loss = loss + answer.sum()
    if loss.requires_grad:
        loss.backward()
    tokens = [token for runs in wanted for run in runs for token in run]
    for rank, tensor in enumerate(own):
        times = [tokens.count(rank * length + row) for row in range(length)]
        grad = torch.zeros(length) if tensor.grad is None else tensor.grad.flatten()
        assert grad.tolist() == times


def test_neighbouring_runs_are_taken_as_a_view():
    assert rows_of((range(10, 12), range(12, 15)), 10, CPU) == slice(0, 5)
    assert rows_of((range(10, 12), range(13, 15)), 10, CPU).tolist() == [0, 1, 3, 4]
    assert rows_of((), 10, CPU) == slice(0, 0)
