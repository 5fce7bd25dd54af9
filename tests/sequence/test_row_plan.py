# SPDX-License-Identifier: Apache-2.0
"""Row plans against counting by hand: every rank's part together, without ranks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_dsv4_cp.sequence.row_plan import RowPlan, rows_of, take

CPU = torch.device("cpu")


def plans_of(wanted, *held):
    return [RowPlan.of(wanted, *held, rank=rank, device=CPU) for rank in range(len(wanted))]


def tokens_of(runs):
    return [token for run in runs for token in run]


def answers_of(plans, own, leaving):
    """Exchange rows by hand; check the counts and that all ranks agree whether any row moves."""
    parts = [rows.split(p.leaving_counts, dim=1) for p, rows in zip(plans, leaving, strict=True)]
    answers = []
    for rank, plan in enumerate(plans):
        arriving = [sender[rank] for sender in parts]
        assert plan.arriving_counts == tuple(rows.shape[1] for rows in arriving)
        assert plan.moves == any(rows.numel() for sender in parts for rows in sender)
        answers.append(plan.answer(own[rank], torch.cat(arriving, 1) if plan.moves else None))
    return answers


@st.composite
def fetches(draw):
    """Draw shards, and of each rank runs of positions that it wants, some before the first."""
    ranks, length = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    total = ranks * length
    wanted = []
    for _ in range(ranks):
        begins = draw(st.lists(st.integers(-3, total - 1), max_size=4))
        wanted.append(tuple(range(b, draw(st.integers(b, total))) for b in begins))
    return ranks, length, tuple(wanted)


@given(fetches())
def test_answers_hold_what_is_wanted_and_gradients_return_to_the_owners(drawn):
    ranks, length, wanted = drawn
    plans = plans_of(wanted, tuple((range(r * length, (r + 1) * length),) for r in range(ranks)))
    whole = torch.arange(1.0, ranks * length + 1)[None, :, None]
    shards = [part.clone().requires_grad_() for part in whole.split(length, dim=1)]
    divided = [plan.divide(tensor) for plan, tensor in zip(plans, shards, strict=True)]
    loss = torch.zeros(())
    for runs, answer in zip(wanted, answers_of(plans, *zip(*divided, strict=True)), strict=True):
        assert answer.flatten().tolist() == [max(token + 1, 0) for token in tokens_of(runs)]
        loss = loss + answer.sum()
    if loss.requires_grad:
        loss.backward()
    tokens = [token for runs in wanted for token in tokens_of(runs)]
    for rank, tensor in enumerate(shards):
        times = [tokens.count(rank * length + row) for row in range(length)]
        grad = torch.zeros(length) if tensor.grad is None else tensor.grad.flatten()
        assert grad.tolist() == times


@st.composite
def returns(draw):
    """Draw which rank computes which tokens, and whether those of its own shard stay."""
    ranks, length = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    computed = draw(st.permutations(range(ranks * length)))
    apart = draw(st.booleans())
    wanted, own, sent = [], [], []
    for rank in range(ranks):
        shard = range(rank * length, (rank + 1) * length)
        runs = [range(t, t + 1) for t in sorted(computed[shard.start : shard.stop])]
        local = [run for run in runs if apart and run.start in shard]
        own.append(tuple(local))
        sent.append(tuple(run for run in runs if run not in local))
        within = st.integers(-2, shard.stop) if rank == 0 else st.integers(shard.start, shard.stop)
        bounds = draw(st.lists(st.tuples(within, within), max_size=4))
        wanted.append(tuple(range(*sorted(pair)) for pair in bounds))
    return wanted, own, sent


@given(returns())
def test_rows_computed_elsewhere_return_in_the_order_wanted(drawn):
    wanted, own, sent = drawn
    plans = plans_of(wanted, own, sent)
    tensors = [[torch.tensor(tokens_of(r))[None, :] + 1 for r in held] for held in (own, sent)]
    mine = [take(rows, plan.own) for plan, rows in zip(plans, tensors[0], strict=True)]
    leaving = [take(rows, plan.leaving) for plan, rows in zip(plans, tensors[1], strict=True)]
    for runs, plan, answer in zip(wanted, plans, answers_of(plans, mine, leaving), strict=True):
        assert answer.flatten().tolist() == [max(token + 1, 0) for token in tokens_of(runs)]
        assert plan.missing == sum(token < 0 for token in tokens_of(runs))


def test_neighboring_runs_are_taken_as_a_view():
    assert rows_of((range(10, 12), range(12, 15)), 10, CPU) == slice(0, 5)
    assert rows_of((range(10, 12), range(13, 15)), 10, CPU).tolist() == [0, 1, 3, 4]
    assert rows_of((), 10, CPU) == slice(0, 0)
