# SPDX-License-Identifier: Apache-2.0
"""Packed rows and other per-token tensors that are broken, and the error of each."""

from __future__ import annotations

import torch

from nemo_dsv4_cp.sequence.lengths import NO_DOCUMENT
from tests.breaking import (
    NAN,
    VOCAB,
    another_row,
    argue,
    at,
    both,
    declared,
    drop,
    longer,
    nested,
    not_square,
    numbers,
    offsets,
    packed,
    put,
    refused,
    remake,
    section,
    several_documents,
    to_meta,
)

_LENGTHS = "seq_lens is ...; use int64 ["
_UNTOLD = "requires `seq_lens`, `cu_seqlens` or `_packed_seq_ids`"

KINDS = (
    *section(
        "Documents",
        refused(
            "marked as packed, without lengths",
            both(drop("seq_lens", "seq_lens_padded"), put("qkv_format", "thd")),
            _UNTOLD,
            KeyError,
        ),
        refused("padded lengths without lengths", drop("seq_lens"), _UNTOLD, KeyError, packed),
        refused(
            "a negative length",
            remake("seq_lens", at(-3)),
            "seq_lens: row 0 holds the length -3; lengths are 0 or more, and -1000 fills up rows",
            fits=packed,
        ),
        refused(
            "a length of 2^40",
            both(remake("seq_lens", at(1 << 40)), drop("seq_lens_padded")),
            "seq_lens: the documents of row 0 overrun it: document 0 ends at token 1099511627776",
            fits=packed,
        ),
        refused("lengths: floats", remake("seq_lens", torch.Tensor.float), _LENGTHS, fits=packed),
        refused("lengths: NaN", remake("seq_lens", lambda t: t * NAN), _LENGTHS, fits=packed),
        refused("lengths: bools", remake("seq_lens", torch.Tensor.bool), _LENGTHS, fits=packed),
        refused("lengths: a list", remake("seq_lens", torch.Tensor.tolist), _LENGTHS, fits=packed),
        refused(
            "lengths: of three dimensions",
            remake("seq_lens", lambda t: t[None]),
            _LENGTHS,
            fits=packed,
        ),
        refused("lengths: on the meta device", remake("seq_lens", to_meta), _LENGTHS, fits=packed),
        refused(
            "lengths: one row too many",
            remake("seq_lens", another_row),
            "seq_lens describes ... rows, and the batch has",
            fits=packed,
        ),
        refused(
            "padded lengths: shorter than the documents",
            remake("seq_lens_padded", at(0)),
            "seq_lens: document 0 of row 0 has ... tokens, and seq_lens_padded gives it 0",
            fits=packed,
        ),
        refused(
            "padded lengths: one document too few",
            remake("seq_lens_padded", at(NO_DOCUMENT)),
            "seq_lens: row 0 describes ... documents, and seq_lens_padded ...; use as many numbers",
            fits=packed,
        ),
        refused(
            "padded lengths: one row too many",
            remake("seq_lens_padded", another_row),
            "seq_lens_padded describes ... rows, and the batch has",
            fits=packed,
        ),
        refused(
            "`cu_seqlens`: that start at 1",
            both(put("cu_seqlens", lambda b: offsets(b["seq_lens"]) + 1), drop("seq_lens")),
            "cu_seqlens: row 0 does not count up from 0: [1, ",
            fits=packed,
        ),
        refused(
            "`cu_seqlens`: that go down",
            both(put("cu_seqlens", lambda b: offsets(b["seq_lens"]).flip(1)), drop("seq_lens")),
            "cu_seqlens: row 0 does not count up from 0: [",
            fits=packed,
        ),
        refused(
            "`cu_seqlens`: floats",
            both(put("cu_seqlens", lambda b: offsets(b["seq_lens"]) * 1.0), drop("seq_lens")),
            "cu_seqlens is float32 ...; use int64 [",
            fits=packed,
        ),
        refused(
            "`_packed_seq_ids`: one token too many",
            both(put("_packed_seq_ids", lambda b: longer(numbers(b))), drop("seq_lens")),
            "_packed_seq_ids is int64 ...; use int64 [...], an integer per token",
            fits=packed,
        ),
        refused(
            "`_packed_seq_ids`: floats",
            both(put("_packed_seq_ids", lambda b: numbers(b) * 1.0), drop("seq_lens")),
            "_packed_seq_ids is float32 ...; use int64 [...], an integer per token",
            fits=packed,
        ),
        refused(
            "`seq_lens` and `cu_seqlens` that disagree",
            put("cu_seqlens", lambda b: at(0, token=1)(offsets(b["seq_lens"]))),
            "seq_lens and cu_seqlens describe different documents of row 0; leave one of them out",
            fits=packed,
        ),
        refused(
            "no document",
            both(*(remake(key, torch.zeros_like) for key in ("seq_lens", "seq_lens_padded"))),
            "the packed rows hold no document: pack one token at least",
            fits=packed,
        ),
        refused(
            "a label on a token outside all documents",
            both(
                *(remake(key, at(0)) for key in ("seq_lens", "seq_lens_padded")),
                drop("position_ids"),
            ),
            "has a label and belongs to no document; fix the packer's lengths, or set the label",
            fits=several_documents,
        ),
    ),
    *section(
        "Other keys and arguments",
        refused(
            "`_cp_metadata_seq_dims`: a dimension that the tensor does not have",
            declared({"advantages": 2}),
            "advantages is ..., and by _cp_metadata_seq_dims its dimension 2 follows tokens",
        ),
        refused(
            "`_cp_metadata_seq_dims`: a dimension that is not as long as the row",
            declared({"weights": 0}, weights=torch.ones(999)),
            "weights is ..., and by _cp_metadata_seq_dims its dimension 0 follows tokens",
        ),
        refused(
            "`_cp_metadata_seq_dims`: the batch dimension of the labels",
            declared({"labels": 0}),
            "labels is ..., and by _cp_metadata_seq_dims its dimension 0 follows tokens",
            fits=not_square,
        ),
        refused(
            "`_cp_metadata_seq_dims`: a list",
            declared(["advantages"]),
            "_cp_metadata_seq_dims=['advantages'] is not a mapping of keys to numbers",
        ),
        refused(
            "`_cp_metadata_pad_values`: text",
            declared({"advantages": 1}, _cp_metadata_pad_values={"advantages": "0"}),
            "_cp_metadata_pad_values={'advantages': '0'} is not a mapping of keys to numbers",
        ),
        refused(
            "another tensor of the tokens' shape, on the meta device",
            put("advantages", lambda b: to_meta(b["input_ids"])),
            "advantages is int64 ... on meta, beside tokens ...; use a plain tensor with data",
        ),
        refused(
            "another tensor, nested",
            put("advantages", lambda b: nested(b["input_ids"])),
            "advantages is a nested tensor, beside tokens ...; use a plain tensor with data",
        ),
        refused(
            "a negative `pad_multiple`",
            argue(pad_multiple=-8),
            "pad_multiple=-8 is not an integer of 0 or more",
        ),
        refused(
            "a `pad_multiple` of 8.5",
            argue(pad_multiple=8.5),
            "pad_multiple=8.5 is not an integer of 0 or more",
        ),
        refused(
            "a negative `padding_token_id`",
            argue(padding_token_id=-1),
            "padding_token_id=-1 is no token id, 0 to 96; set the tokenizer's pad_token",
        ),
        refused(
            "a `padding_token_id` beyond the vocabulary",
            argue(padding_token_id=VOCAB),
            "padding_token_id=97 is no token id, 0 to 96; set the tokenizer's pad_token",
        ),
        refused(
            "a `padding_token_id` that is text",
            argue(padding_token_id="<pad>"),
            "padding_token_id='<pad>' is no token id, 0 to 96; set the tokenizer's pad_token",
        ),
    ),
)
