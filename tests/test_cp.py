# SPDX-License-Identifier: Apache-2.0
"""`nemo_dsv4_cp.cp` with a mocked mesh, against AutoModel's functions of the same names."""

import contextlib
import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemo_automodel.components.models.deepseek_v4 import cp as automodel

from nemo_dsv4_cp import cp
from nemo_dsv4_cp.tools.verification import packed_batch
from tests.meshes import FakeMesh

SEED_API = [
    "_lcm",
    "_pad_position_ids_seq_dim_",
    "_pad_tensor_seq_dim_",
    "build_dsv4_cp_causal_padding_mask",
    "build_dsv4_cp_packed_causal_padding_mask",
    "build_packed_seq_ids",
    "dsv4_cp_all_gather",
    "dsv4_cp_all_gather_metadata",
    "dsv4_cp_enabled",
    "dsv4_cp_local_seq_multiple",
    "dsv4_cp_rank",
    "dsv4_cp_size",
    "make_dsv4_contiguous_shard_cp_batch_and_ctx",
]


def ids(seq_len, rows=1):
    return torch.arange(rows * seq_len).view(rows, seq_len)


def shard(batch, cp_size=2, rank=0, **options):
    mesh = FakeMesh(cp_size, rank)
    return cp.make_dsv4_contiguous_shard_cp_batch_and_ctx(mesh, None, batch, **options)


def whole(batch, cp_size, **options):
    """Shard for every rank and put each tensor back together."""
    copies = [
        {k: v.clone() if torch.is_tensor(v) else v for k, v in batch.items()}
        for _ in range(cp_size)
    ]
    parts = [shard(copy, cp_size, rank, **options)[1] for rank, copy in enumerate(copies)]
    dims = {"position_ids": -1}
    return {
        key: torch.cat([part[key] for part in parts], dim=dims.get(key, 1))
        for key, value in parts[0].items()
        if torch.is_tensor(value)
    }


@pytest.mark.parametrize("name", SEED_API)
def test_every_function_of_the_seed_page_takes_the_parameters_of_the_page(name):
    mine = inspect.signature(getattr(cp, name)).parameters
    if not hasattr(automodel, name):  # the batch helpers moved to AutoModel's sharder module
        assert list(mine)[:3] == [
            "tensor" if "tensor" in name else "position_ids",
            "seq_dim",
            "pad_len",
        ]
        return
    theirs = inspect.signature(getattr(automodel, name)).parameters
    for parameter in mine.values():
        assert parameter.name in theirs
        assert parameter.kind == theirs[parameter.name].kind
        assert parameter.default == theirs[parameter.name].default
    assert set(theirs) == set(mine)


@given(st.integers(0, 300), st.integers(0, 300))
def test_lcm_is_automodel(a, b):
    assert cp._lcm(a, b) == automodel._lcm(a, b)


@given(st.one_of(st.none(), st.lists(st.sampled_from([-1, 0, 2, 3, 4, 8, 128]), max_size=6)))
def test_local_seq_multiple_is_automodel(ratios):
    config = SimpleNamespace(compress_ratios=ratios)
    expected = automodel.dsv4_cp_local_seq_multiple(config)
    assert cp.dsv4_cp_local_seq_multiple(config) == expected
    assert cp.dsv4_cp_local_seq_multiple(SimpleNamespace(config=config)) == expected


def test_without_a_process_group_there_is_one_rank():
    for group in (None, "not a group"):
        assert cp.dsv4_cp_enabled(group) is False
        assert cp.dsv4_cp_rank(group) == 0
        assert cp.dsv4_cp_size(group) == 1
        tensor = torch.ones(2)
        assert cp.dsv4_cp_all_gather(tensor, dim=0, cp_group=group) is tensor
        assert cp.dsv4_cp_all_gather_metadata(tensor, dim=0, cp_group=group) is tensor
    assert cp.dsv4_cp_all_gather_metadata(None, dim=0, cp_group=None) is None


def test_padding_by_nothing_returns_the_tensor_itself():
    tensor = ids(4)
    assert cp._pad_tensor_seq_dim_(tensor, 1, 0, 7) is tensor
    assert cp._pad_position_ids_seq_dim_(tensor, 1, -1) is tensor


def test_padding_fills_the_named_dimension_and_positions_keep_counting():
    embeds = torch.ones(1, 2, 3)
    padded = cp._pad_tensor_seq_dim_(embeds, 1, 2, 0)
    assert padded.shape == (1, 4, 3)
    assert padded[:, 2:].eq(0).all()
    positions = torch.tensor([[[3, 4], [8, 9]]])
    counted = cp._pad_position_ids_seq_dim_(positions, 2, 3)
    assert counted.tolist() == [[[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]]]
    assert counted.dtype == positions.dtype


def test_a_rank_keeps_its_contiguous_slice_and_the_group():
    context, batch = shard({"input_ids": ids(8), "labels": ids(8)}, rank=1)
    assert context is contextlib.nullcontext
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[4, 5, 6, 7]]
    assert batch["position_ids"].tolist() == [[4, 5, 6, 7]]
    assert batch["_dsv4_cp_group"] == "the CP group"
    assert batch["input_ids"].is_contiguous()


def test_pad_sentinels_mean_nothing_to_see_here():
    batch = whole(
        {"input_ids": ids(5) + 1, "labels": ids(5) + 1, "attention_mask": torch.ones(1, 5)},
        2,
        padding_token_id=99,
        loss_mask=torch.ones(1, 5),
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 99, 99, 99]]
    assert batch["labels"].tolist() == [[1, 2, 3, 4, 5, -100, -100, -100]]
    assert batch["padding_mask"].tolist() == [[False] * 5 + [True] * 3]
    assert batch["position_ids"].tolist() == [list(range(8))]
    assert batch["loss_mask"].tolist() == [[1.0] * 5 + [0.0] * 3]


@pytest.mark.parametrize(("pad_multiple", "local"), [(None, 4), (1, 4), (2, 4), (4, 4), (8, 8)])
def test_pad_multiple_rules_the_shard_and_is_at_least_two(pad_multiple, local):
    _, batch = shard({"input_ids": ids(7), "labels": ids(7)}, pad_multiple=pad_multiple)
    assert batch["input_ids"].shape == (1, local)


@pytest.mark.parametrize("form", ["2d", "4d bool", "4d additive"])
def test_every_form_of_attention_mask_becomes_a_padding_mask(form):
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    diagonal = torch.diag_embed(real)[:, None]
    mask = {"2d": real, "4d bool": diagonal.bool(), "4d additive": (diagonal - 1) * 1e9}[form]
    batch = whole({"input_ids": ids(4, 2), "labels": ids(4, 2), "attention_mask": mask}, 2)
    assert "attention_mask" not in batch
    assert batch["padding_mask"].tolist() == (real == 0).tolist()


def test_a_padding_mask_in_the_batch_is_kept():
    given_mask = torch.tensor([[False, True, False, False]])  # token ids that look like padding
    batch = whole({"input_ids": ids(4), "labels": ids(4), "padding_mask": given_mask}, 2)
    assert batch["padding_mask"].tolist() == given_mask.tolist()


def test_embeddings_are_cut_like_ids():
    embeds = torch.randn(2, 6, 3)
    batch = whole({"inputs_embeds": embeds, "labels": ids(6, 2)}, 2)
    assert batch["inputs_embeds"].shape == (2, 8, 3)
    assert torch.equal(batch["inputs_embeds"][:, :6], embeds)
    assert batch["inputs_embeds"][:, 6:].eq(0).all()


@pytest.mark.parametrize("shape", ["B S", "1 S", "B 3 S", "3 B S"])
def test_positions_of_every_shape_are_cut_on_their_sequence_dimension(shape):
    rows = torch.arange(10).expand(2, -1)
    positions = {
        "B S": rows,
        "1 S": rows[:1],
        "B 3 S": rows[:, None].expand(2, 3, -1),
        "3 B S": rows[None].expand(3, 2, -1),
    }[shape]
    batch = whole({"input_ids": ids(10, 2), "labels": ids(10, 2), "position_ids": positions}, 2)
    assert batch["position_ids"].shape[-1] == 12
    assert batch["position_ids"].reshape(-1, 12).unique(dim=0).tolist() == [list(range(12))]


def test_a_loss_mask_stands_in_for_missing_labels_only():
    _, alone = shard({"input_ids": ids(8)}, loss_mask=torch.ones(1, 8))
    assert alone["labels"].tolist() == [[1.0] * 4]
    assert "loss_mask" not in alone
    _, beside = shard({"input_ids": ids(8), "labels": ids(8)}, loss_mask=torch.ones(1, 8))
    assert beside["labels"].tolist() == [[0, 1, 2, 3]]
    assert beside["loss_mask"].shape == (1, 4)


def test_it_works_bound_to_a_batch_as_a_partial():
    batch = {"input_ids": ids(300), "labels": ids(300)}
    batch["_cp_make_batch_fn"] = functools.partial(
        cp.make_dsv4_contiguous_shard_cp_batch_and_ctx, pad_multiple=128
    )
    make = batch.pop("_cp_make_batch_fn")
    _, cut = make(FakeMesh(2, 1), None, batch, loss_mask=None, padding_token_id=5)
    assert cut["input_ids"].shape == (1, 256)
    assert cut["input_ids"][0, -1] == 5


def test_one_rank_changes_no_token():
    batch = {"input_ids": ids(5), "attention_mask": torch.ones(1, 5)}
    expected = dict(batch)
    _, uncut = shard(dict(batch), cp_size=1, loss_mask=ids(5))
    assert uncut["labels"] is not None
    assert all(uncut[key] is expected[key] for key in expected)
    assert "_dsv4_cp_group" not in uncut


@given(
    rows=st.integers(1, 3),
    seq_len=st.integers(1, 70),
    cp_size=st.integers(2, 5),
    pad_multiple=st.one_of(st.none(), st.integers(1, 9)),
    padded_from=st.integers(1, 70),
)
def test_the_batch_is_automodels_batch(rows, seq_len, cp_size, pad_multiple, padded_from):
    mask = (torch.arange(seq_len) < padded_from).long().expand(rows, -1)
    for rank in range(cp_size):
        make = {
            "input_ids": ids(seq_len, rows),
            "labels": ids(seq_len, rows),
            "attention_mask": mask,
        }
        mesh = FakeMesh(cp_size, rank)
        options = {"padding_token_id": 3, "pad_multiple": pad_multiple}
        theirs = automodel.make_dsv4_contiguous_shard_cp_batch_and_ctx(
            mesh, None, dict(make), **options
        )
        mine = cp.make_dsv4_contiguous_shard_cp_batch_and_ctx(mesh, None, dict(make), **options)
        assert mine[0] is theirs[0]
        assert set(mine[1]) == set(theirs[1])
        for key, value in theirs[1].items():
            same = torch.equal if torch.is_tensor(value) else lambda a, b: a == b
            assert same(mine[1][key], value), key


@pytest.mark.parametrize("keys", [("input_ids", "inputs_embeds"), ()])
def test_exactly_one_primary_tensor_is_needed(keys):
    tensors = {"input_ids": ids(8), "inputs_embeds": torch.ones(1, 8, 2)}
    with pytest.raises(AssertionError, match="exactly one"):
        shard({"labels": ids(8)} | {key: tensors[key] for key in keys})


def test_labels_are_needed():
    with pytest.raises(KeyError, match="labels"):
        shard({"input_ids": ids(8)})


@settings(deadline=None)
@given(
    documents=st.lists(
        st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=2
    ),
    inner=st.integers(0, 5),
    rank=st.integers(0, 2),
    multiple=st.sampled_from([None, 8, 12]),
)
def test_packed_rows_are_cut_as_automodel_cuts_them(documents, inner, rank, multiple):
    """AutoModel's function pads documents; ``inner`` is padding that the packer left between."""
    rows = [[n + inner for n in row] for row in documents]
    batch = packed_batch(rows, max(map(sum, rows)) + 3, seed=len(documents), vocab=97)
    for row, lengths in enumerate(documents):
        batch["seq_lens"][row, : len(lengths)] = torch.tensor(lengths)
        begin = 0
        for length in lengths:
            batch["labels"][row, begin + length : begin + length + inner] = -100
            begin += length + inner
    mask = torch.rand(batch["labels"].shape).round()
    mesh, options = FakeMesh(3, rank), {"padding_token_id": 7, "pad_multiple": multiple}
    theirs = automodel.make_dsv4_contiguous_shard_cp_batch_and_ctx(
        mesh, None, dict(batch), loss_mask=mask, **options
    )[1]
    mine = cp.make_dsv4_contiguous_shard_cp_batch_and_ctx(
        mesh, None, dict(batch), loss_mask=mask, **options
    )[1]
    assert set(mine) == set(theirs)
    for key, value in theirs.items():
        if torch.is_tensor(value):
            assert torch.equal(mine[key], value), key


@given(
    st.lists(st.lists(st.integers(-1000, 9), min_size=4, max_size=4), min_size=1, max_size=3),
    st.integers(1, 20),
)
def test_document_numbers_are_automodel(lengths, seq_len):
    lengths = torch.tensor([[n if n >= 0 else -1000 for n in row] for row in lengths])
    arguments = {"seq_len": seq_len, "device": torch.device("cpu")}
    expected = automodel.build_packed_seq_ids(lengths, **arguments)
    assert torch.equal(cp.build_packed_seq_ids(lengths, **arguments), expected)


def test_positions_and_padding_are_taken_as_they_come():
    batch = whole(
        {
            "input_ids": ids(4),
            "labels": ids(4),
            "attention_mask": torch.tensor([[0, 1, 0, 1]]),
            "position_ids": torch.tensor([[5, 6, 0, 1]]),
        },
        2,
    )
    assert batch["padding_mask"].tolist() == [[True, False, True, False]]
    assert batch["position_ids"].tolist() == [[5, 6, 0, 1]]


def test_tokens_of_no_document_are_left_out_labels_and_all():
    batch = whole({"input_ids": ids(6), "labels": ids(6), "seq_lens": torch.tensor([[2, 2]])}, 2)
    assert batch["labels"].tolist() == [[0, 1, 2, 3]]


def test_no_padding_mask_is_added_and_other_keys_are_left_whole():
    images = torch.ones(1, 3)
    batch = {"input_ids": ids(5), "labels": ids(5), "weights": ids(5), "pixel_values": images}
    _, cut = shard(batch)
    assert "padding_mask" not in cut
    assert cut["weights"].shape == (1, 5)
    assert cut["pixel_values"] is images


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 8])}, NotImplementedError, "contiguous_shard, which"),
        ({"seq_lens": torch.tensor([[8]]), "labels": None}, KeyError, "no loss_mask stands in"),
        ({"seq_lens": torch.tensor([[5, 4]])}, ValueError, "document 1 ends at token 9 of 8"),
    ],
)
def test_what_automodel_refuses_is_refused_with_a_way_out(batch, error, message):
    with pytest.raises(error, match=message):
        shard({"input_ids": ids(8), "labels": ids(8)} | batch, loss_mask=ids(8))


def test_a_packed_batch_without_lengths_is_refused():
    with pytest.raises(KeyError, match="requires `seq_lens`"):
        shard({"input_ids": ids(8), "labels": ids(8), "qkv_format": "thd"})


@given(
    seq_len=st.integers(1, 12),
    start=st.integers(0, 11),
    window=st.one_of(st.none(), st.integers(0, 6)),
    key_len=st.integers(1, 14),
)
def test_the_dense_mask_is_automodel(seq_len, start, window, key_len):
    arguments = {
        "position_ids": torch.arange(start, start + seq_len),
        "key_len": key_len,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "cp_group": None,
        "padding_mask": (torch.arange(key_len) > 4)[None],
        "sliding_window": window,
    }
    mine = cp.build_dsv4_cp_causal_padding_mask(**arguments)
    assert torch.equal(mine, automodel.build_dsv4_cp_causal_padding_mask(**arguments))


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    window=st.one_of(st.none(), st.integers(0, 6)),
)
def test_the_dense_mask_of_packed_rows_is_automodel(lengths, window):
    numbers = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)] + [torch.zeros(2)])
    arguments = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(2)]),
        "packed_seq_ids": numbers,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "cp_group": None,
        "padding_mask": (numbers == 0)[None],
        "sliding_window": window,
    }
    mine = cp.build_dsv4_cp_packed_causal_padding_mask(**arguments)
    assert torch.equal(mine, automodel.build_dsv4_cp_packed_causal_padding_mask(**arguments))
