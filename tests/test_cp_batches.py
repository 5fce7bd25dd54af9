# SPDX-License-Identifier: Apache-2.0
"""Batches as a loop may bring them, odd ones too: `nemo_dsv4_cp.cp` against AutoModel."""

import contextlib

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nemo_automodel.components.models.deepseek_v4 import cp as automodel

from nemo_dsv4_cp import cp
from tests.meshes import FakeMesh


@st.composite
def masks(draw, rows, seq_len):
    """Right padding, left padding, holes; 2-D, 4-D bool or 4-D additive."""
    real = draw(st.lists(st.booleans(), min_size=rows * seq_len, max_size=rows * seq_len))
    real = torch.tensor(real).view(rows, seq_len)
    if draw(st.booleans()):
        real = torch.arange(seq_len).expand(rows, -1) < draw(st.integers(0, seq_len))
    diagonal = torch.diag_embed(real.long())[:, None]
    forms = [real, real.long(), real.float(), diagonal.bool(), (diagonal - 1) * 1e9]
    return draw(st.sampled_from(forms))


@st.composite
def positions(draw, rows, seq_len):
    """Counting from anywhere, restarting, arbitrary; of every shape, a wrong one now and then."""
    counting = torch.arange(seq_len) + draw(st.integers(-3, 9))
    drawn = st.lists(st.integers(-9, 99), min_size=rows * seq_len, max_size=rows * seq_len)
    of_rows = draw(
        st.one_of(
            st.just(counting.repeat(rows, 1)),
            st.integers(1, 5).map(lambda n: (counting % n).repeat(rows, 1)),
            drawn.map(lambda numbers: torch.tensor(numbers).view(rows, seq_len)),
        )
    )
    three = torch.stack([of_rows, of_rows + 1, of_rows * 2])
    shapes = [of_rows, of_rows[:1], of_rows.t().contiguous().t(), three, three.transpose(0, 1)]
    wrong = [of_rows[0], of_rows[:, 1:], of_rows.repeat(2, 1), three[None], None]
    chosen = draw(st.sampled_from(shapes * 3 + wrong))
    kind = draw(st.sampled_from([torch.int64, torch.int32, torch.float32]))
    return None if chosen is None else chosen.to(kind)


@st.composite
def row_batches(draw):
    rows, seq_len = draw(st.integers(1, 3)), draw(st.integers(0, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))

    def numbers(width=seq_len, *more):
        return torch.randint(-100, 100, (rows, width, *more), generator=generator)

    other = max(0, seq_len + draw(st.sampled_from([0, 0, 0, -2, 3])))  # labels of another length
    optional = {
        "input_ids": numbers(),
        "inputs_embeds": numbers(seq_len, 3).float().requires_grad_(),
        "labels": draw(st.sampled_from([numbers(), numbers(other), numbers().repeat(2, 1)])),
        "attention_mask": draw(st.one_of(st.none(), masks(rows, seq_len))),
        "padding_mask": draw(st.sampled_from([numbers() > 0, numbers(other) > 0, numbers() % 2])),
        "position_ids": draw(positions(rows, seq_len)),
        "loss_mask": numbers(),
        "advantages": numbers().float(),
        "packed_seq_ids": numbers(),
        "_packed_seq_ids": numbers(),
        "cu_seqlens_padded": torch.tensor([0, seq_len]),
        "sample_weight": torch.ones(rows),
        "pixel_values": torch.ones(1, 3),
        "qkv_format": draw(st.sampled_from(["bshd", "thd"])),
        "name": "a batch",
    }
    present = {key for key in optional if draw(st.booleans())}
    if draw(st.integers(0, 5)):  # seldom what both refuse
        present -= {"input_ids", "inputs_embeds", "qkv_format"}
        present |= {draw(st.sampled_from(["input_ids", "inputs_embeds"])), "labels"}
    options = {"loss_mask": draw(st.sampled_from([None, numbers(other).float()]))}
    return {key: optional[key] for key in optional if key in present}, options


@st.composite
def packed_batches(draw):
    """Documents with padding after them, of no token, overrunning; lengths that disagree."""
    batch, options = draw(row_batches())
    rows, seq_len = next(
        (tuple(batch[key].shape[:2]) for key in ("input_ids", "inputs_embeds") if key in batch),
        (1, 4),
    )
    width = draw(st.integers(1, 4))
    length = st.sampled_from([*range(seq_len // width + 1), -1000, -3, seq_len + 1])
    of_row = st.lists(length, min_size=width, max_size=width)
    described = [rows] * 6 + [rows + 1, max(rows - 1, 1)]
    lengths = torch.tensor([draw(of_row) for _ in range(draw(st.sampled_from(described)))])
    inner = torch.tensor([draw(of_row) for _ in range(len(lengths))])
    padded = draw(
        st.sampled_from(
            [lengths, lengths.where(lengths == -1000, lengths + inner.clamp(0, 2)), inner]
        )
    )
    forms = {"seq_lens": lengths, "seq_lens_padded": padded}
    if draw(st.booleans()):
        forms.pop("seq_lens_padded")
    if rows == 1 and draw(st.booleans()):
        forms = {key: value[0] for key, value in forms.items()}
    if draw(st.booleans()):
        forms["cu_seqlens"] = lengths.clamp(0).cumsum(-1)
    if not draw(st.integers(0, 9)):
        forms.pop("seq_lens")
    return batch | forms, options


def outcome(function, mesh, batch, options):
    """Return the batch as cut, or the error."""

    def own(values):
        return {k: v.clone() if torch.is_tensor(v) else v for k, v in values.items()}

    batch = own(batch)
    try:
        context, cut = function(mesh, None, batch, **own(options))[:2]
    except Exception as error:
        return error
    assert context is contextlib.nullcontext
    assert cut is batch
    return cut


def assert_outcomes_agree(mine, theirs):
    meant = isinstance(theirs, AssertionError | KeyError | NotImplementedError | ValueError)
    if meant and "torch.cat()" not in str(theirs):  # a row of no document: AutoModel stumbles
        assert type(mine) is type(theirs), (mine, theirs)
    if isinstance(theirs, Exception):
        return
    assert isinstance(mine, dict), mine
    assert set(mine) == set(theirs)
    for key, value in theirs.items():
        if torch.is_tensor(value):
            assert mine[key].dtype == value.dtype, key
            assert mine[key].is_contiguous() == value.is_contiguous(), key
            assert mine[key].requires_grad == value.requires_grad, key
            assert torch.equal(mine[key], value), key
        else:
            assert mine[key] == value, key


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    drawn=st.one_of(row_batches(), packed_batches(), packed_batches()),
    cp_size=st.integers(1, 4),
    rank=st.integers(0, 3),
    pad_multiple=st.sampled_from([None, 0, 1, 2, 3, 8]),
    sync=st.booleans(),
)
def test_whatever_automodel_makes_of_a_batch_is_what_it_becomes(
    drawn, cp_size, rank, pad_multiple, sync
):
    """Its tensors bit for bit, and the errors that it means to raise."""
    batch, options = drawn
    options |= {"padding_token_id": 7, "pad_multiple": pad_multiple, "sync_packed_length": sync}
    mesh = FakeMesh(cp_size, rank % cp_size)
    theirs = outcome(automodel.make_dsv4_contiguous_shard_cp_batch_and_ctx, mesh, batch, options)
    mine = outcome(cp.make_dsv4_contiguous_shard_cp_batch_and_ctx, mesh, batch, options)
    assert_outcomes_agree(mine, theirs)
