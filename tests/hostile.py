# SPDX-License-Identifier: Apache-2.0
"""Ways to break a valid batch or recipe, section by section, and what comes of each."""

from __future__ import annotations

import collections
import dataclasses

import torch

from nemo_dsv4_cp.sequence.packing import NO_DOCUMENT
from tests.breaking import (
    NAN,
    VOCAB,
    WRONG_VALUES,
    Kind,
    additive,
    all_tensors,
    another_row,
    argue,
    as_meant,
    at,
    block,
    both,
    by_columns,
    declared,
    drop,
    embedded,
    every_other,
    fields,
    half_real,
    longer,
    nested,
    not_square,
    numbers,
    offsets,
    one_packed_row,
    one_row_for_all,
    one_token_for_all,
    packed,
    plain,
    put,
    refused,
    remake,
    several_documents,
    several_tokens,
    square,
    to_meta,
    whole,
)

_IDS = "input_ids is ...; use int64 [B, S] with data"
_EMBEDS = "inputs_embeds is ...; use float32 [B, S, E] with data"
_ONE_OF = "a batch must hold exactly one of `input_ids` and `inputs_embeds`"
_NOTHING = "no row, or no token in a row; leave such a batch out"
_LABELS = "labels is ..., beside tokens ...; use int64 ["
_NO_LABELS = "context parallelism needs `labels` in the batch"
_WEIGHTS = "loss_mask is ..., beside tokens ...; use float32 ["
_MASK = "attention_mask is ..., beside tokens ...; use bool ["
_VALUES = "attention_mask holds ...; 1 is a real token and 0 is padding; tell documents by seq_lens"
_SIDE = 'has real tokens after padding; ... padding_side to "right"'
_PAST = "attention sees the row's whole past and nothing else; tell documents by seq_lens"
_PLACES = "position_ids is ..., beside tokens ...; use int64 ["
_COUNT = "position_ids do not count 0, 1, 2, ... along each row, as if documents were packed"
_LENGTHS = "seq_lens is ...; use int64 ["
_UNTOLD = "requires `seq_lens`, `cu_seqlens` or `_packed_seq_ids`"
_RATIOS = "compress_ratios=... is not a list of whole numbers of 0 or more, one a layer"
_WINDOW = "sliding_window=... is not a whole number of 1 or more"
_OPTION = "context_parallel.OPTION="


def section(name: str, *kinds: Kind) -> tuple[Kind, ...]:
    return tuple(dataclasses.replace(kind, section=name) for kind in kinds)


KINDS = (
    *section(
        "The batch",
        refused("a list instead of a dict", whole(lambda b: [b]), "the batch is of type list"),
        refused("`None` instead of a dict", whole(None), "the batch is of type NoneType"),
        refused("no rows", all_tensors(lambda t: t[:0]), _NOTHING),
        refused("rows without tokens", all_tensors(lambda t: t[:, :0]), _NOTHING),
        refused(
            "images",
            put("pixel_values", torch.ones(1, 3, 4, 4)),
            "images (pixel_values in the batch) are not supported under context parallelism",
            NotImplementedError,
        ),
        refused(
            "a layout other than rows of tokens, such as `qkv_format: sbhd`",
            put("qkv_format", "sbhd"),
            "qkv_format='sbhd' is another layout than rows of tokens",
        ),
    ),
    *section(
        "Tokens",
        refused("neither ids nor embeddings", drop("input_ids"), _ONE_OF, AssertionError),
        refused("ids and embeddings", put("inputs_embeds", embedded), _ONE_OF, AssertionError),
        refused("ids: `None`", put("input_ids", None), _IDS),
        refused("ids: a list", remake("input_ids", torch.Tensor.tolist), _IDS),
        refused("ids: a number", put("input_ids", torch.tensor(1)), _IDS),
        refused("ids: of one dimension", remake("input_ids", torch.flatten), _IDS),
        refused("ids: of three dimensions", remake("input_ids", lambda t: t[None]), _IDS),
        refused("ids: floats", remake("input_ids", torch.Tensor.float), _IDS),
        refused("ids: NaN", remake("input_ids", lambda t: t * NAN), _IDS),
        refused("ids: bools", remake("input_ids", torch.Tensor.bool), _IDS),
        refused("ids: int16", remake("input_ids", torch.Tensor.short), _IDS),
        refused("ids: complex", remake("input_ids", lambda t: t * 1j), _IDS),
        refused("ids: on the meta device", remake("input_ids", to_meta), _IDS),
        refused("ids: sparse", remake("input_ids", torch.Tensor.to_sparse), _IDS),
        refused("ids: nested", remake("input_ids", nested), _IDS),
        refused(
            "a negative id",
            remake("input_ids", at(-1)),
            "input_ids holds -1 for token 0 of row 0; token ids are 0 to 96",
        ),
        refused(
            "an id beyond the vocabulary",
            remake("input_ids", at(VOCAB)),
            "input_ids holds 97 for token 0 of row 0; token ids are 0 to 96",
        ),
        refused(
            "an id of 2^62",
            remake("input_ids", at(1 << 62)),
            "input_ids holds 4611686018427387904 for token 0 of row 0; token ids are 0 to 96",
        ),
        refused(
            "embeddings: of two dimensions",
            both(put("inputs_embeds", lambda b: embedded(b)[..., 0]), drop("input_ids")),
            _EMBEDS,
        ),
        refused(
            "embeddings: integers",
            both(put("inputs_embeds", lambda b: embedded(b).long()), drop("input_ids")),
            _EMBEDS,
        ),
        refused(
            "embeddings: on the meta device",
            both(put("inputs_embeds", lambda b: to_meta(embedded(b))), drop("input_ids")),
            _EMBEDS,
        ),
    ),
    *section(
        "Labels and loss masks",
        refused("no labels", drop("labels"), _NO_LABELS, KeyError),
        refused("labels: `None`", put("labels", None), _NO_LABELS, KeyError),
        refused("labels: one token too many", remake("labels", longer), _LABELS),
        refused("labels: one token too few", remake("labels", lambda t: t[:, 1:]), _LABELS),
        refused("labels: one row too many", remake("labels", another_row), _LABELS),
        refused("labels: one row too few", remake("labels", lambda t: t[1:]), _LABELS),
        refused("labels: of one dimension", remake("labels", lambda t: t[0]), _LABELS),
        refused("labels: of three dimensions", remake("labels", lambda t: t[..., None]), _LABELS),
        refused("labels: a list", remake("labels", torch.Tensor.tolist), _LABELS),
        refused("labels: floats", remake("labels", torch.Tensor.float), _LABELS),
        refused("labels: bools", remake("labels", torch.Tensor.bool), _LABELS),
        refused("labels: uint8", remake("labels", lambda t: t.to(torch.uint8)), _LABELS),
        refused("labels: on the meta device", remake("labels", to_meta), _LABELS),
        refused("labels: sparse", remake("labels", torch.Tensor.to_sparse), _LABELS),
        refused("labels: nested", remake("labels", nested), _LABELS),
        refused(
            "a negative label other than -100",
            remake("labels", at(-1)),
            "labels holds -1 for token 0 of row 0; token ids are 0 to 96, and -100 for none",
        ),
        refused(
            "a label beyond the vocabulary",
            remake("labels", at(VOCAB)),
            "labels holds 97 for token 0 of row 0; token ids are 0 to 96, and -100 for none",
        ),
        refused(
            "labels in a row that is all padding",
            both(remake("attention_mask", torch.zeros_like), remake("labels", at(1))),
            "labels holds ...; attention_mask says that the row is all padding",
            fits=plain,
        ),
        refused(
            "loss mask: one token too many",
            argue(loss_mask=lambda b: longer(b["labels"] * 0.0)),
            _WEIGHTS,
        ),
        refused(
            "loss mask: one row too many, in the batch",
            put("loss_mask", lambda b: another_row(b["labels"] * 0.0)),
            _WEIGHTS,
        ),
        refused(
            "loss mask: on the meta device",
            argue(loss_mask=lambda b: to_meta(b["labels"] * 0.0)),
            _WEIGHTS,
        ),
        refused(
            "loss mask: NaN",
            argue(loss_mask=lambda b: b["labels"] * NAN),
            "loss_mask holds nan for token 0 of row 0; use finite numbers",
        ),
        refused(
            "loss mask: infinite",
            put("loss_mask", lambda b: b["labels"] * 0.0 + float("inf")),
            "loss_mask holds inf for token 0 of row 0; use finite numbers",
        ),
        refused(
            "loss mask: bools, instead of labels",
            both(argue(loss_mask=lambda b: b["labels"] > 0), drop("labels")),
            "loss_mask, in place of labels, is bool ...; use int64 [",
        ),
    ),
    *section(
        "Masks",
        refused(
            "`attention_mask`: one token too many",
            remake("attention_mask", longer),
            _MASK,
            fits=plain,
        ),
        refused(
            "`attention_mask`: one row too many",
            remake("attention_mask", another_row),
            _MASK,
            fits=plain,
        ),
        refused(
            "`attention_mask`: of three dimensions",
            put("attention_mask", lambda b: square(b)[:, 0]),
            _MASK,
            fits=plain,
        ),
        refused(
            "`attention_mask`: a list",
            remake("attention_mask", torch.Tensor.tolist),
            _MASK,
            fits=plain,
        ),
        refused(
            "`attention_mask`: on the meta device",
            remake("attention_mask", to_meta),
            _MASK,
            fits=plain,
        ),
        refused(
            "`attention_mask`: NaN",
            remake("attention_mask", lambda t: t * NAN),
            _VALUES,
            fits=plain,
        ),
        refused(
            "`attention_mask`: document numbers",
            remake("attention_mask", at(2)),
            _VALUES,
            fits=plain,
        ),
        refused(
            "`attention_mask`: 0 and minus infinity",
            remake("attention_mask", lambda t: at(-float("inf"))(t * 0.0)),
            _VALUES,
            fits=plain,
        ),
        refused(
            "`attention_mask`: padding on the left",
            remake("attention_mask", lambda t: at(0)(torch.ones_like(t))),
            _SIDE,
            fits=several_tokens,
        ),
        refused(
            "`attention_mask`: 4-D, one token too many",
            put("attention_mask", lambda b: torch.cat((square(b), square(b)[..., :1]), -1)),
            _MASK,
            fits=plain,
        ),
        refused(
            "`attention_mask`: 4-D, ones and zeros",
            put("attention_mask", lambda b: square(b).float()),
            "attention_mask holds 1.0 ...; in a 4-D mask of floats 0 is seen and a negative number",
            fits=plain,
        ),
        refused(
            "`attention_mask`: 4-D, NaN",
            put("attention_mask", lambda b: square(b) * NAN),
            "attention_mask holds nan ...; in a 4-D mask of floats 0 is seen and a negative number",
            fits=plain,
        ),
        refused(
            "`attention_mask`: 4-D, for documents or a window",
            put("attention_mask", half_real),
            _PAST,
            fits=several_tokens,
        ),
        refused(
            "`attention_mask`: 4-D, not causal",
            put("attention_mask", lambda b: square(b) | square(b).transpose(2, 3)),
            _PAST,
            fits=several_tokens,
        ),
        refused(
            "`padding_mask`: floats",
            put("padding_mask", lambda b: b["input_ids"] * 0.0),
            "padding_mask is float32 ..., beside tokens ...; use bool [",
            fits=plain,
        ),
        refused(
            "`padding_mask`: one token too many",
            put("padding_mask", lambda b: longer(b["input_ids"] < 0)),
            "padding_mask is bool ..., beside tokens ...; use bool [",
            fits=plain,
        ),
    ),
    *section(
        "Positions",
        refused("positions: of one dimension", remake("position_ids", lambda t: t[0]), _PLACES),
        refused(
            "positions: of three dimensions",
            remake("position_ids", lambda t: t.repeat(3, 1, 1)),
            _PLACES,
        ),
        refused("positions: floats", remake("position_ids", torch.Tensor.float), _PLACES),
        refused("positions: NaN", remake("position_ids", lambda t: t * NAN), _PLACES),
        refused(
            "positions: one token too few", remake("position_ids", lambda t: t[:, 1:]), _PLACES
        ),
        refused("positions: on the meta device", remake("position_ids", to_meta), _PLACES),
        refused(
            "positions: that start at 1",
            remake("position_ids", lambda t: t + 1),
            _COUNT,
            fits=plain,
        ),
        refused(
            "positions: that are negative",
            remake("position_ids", lambda t: t - 1),
            _COUNT,
            fits=plain,
        ),
        refused(
            "positions: that restart, without document lengths",
            remake("position_ids", torch.zeros_like),
            _COUNT,
            fits=several_tokens,
        ),
        refused(
            "positions: that disagree with the documents",
            remake("position_ids", lambda t: t + 1),
            "position_ids disagree with the documents of row 0: token 0 is at position 0",
            fits=packed,
        ),
    ),
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
            "seq_lens: row 0 tells ... documents, and seq_lens_padded ...; use as many numbers",
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
            "_packed_seq_ids is int64 ...; use int64 [...], a whole number a token",
            fits=packed,
        ),
        refused(
            "`_packed_seq_ids`: floats",
            both(put("_packed_seq_ids", lambda b: numbers(b) * 1.0), drop("seq_lens")),
            "_packed_seq_ids is float32 ...; use int64 [...], a whole number a token",
            fits=packed,
        ),
        refused(
            "`seq_lens` and `cu_seqlens` that disagree",
            put("cu_seqlens", lambda b: at(0, token=1)(offsets(b["seq_lens"]))),
            "seq_lens and cu_seqlens tell different documents of row 0; leave one of them out",
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
            "has a label and belongs to no document; mend the packer's lengths, or set the label",
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
            "pad_multiple=-8 is no whole number of 0 or more",
        ),
        refused(
            "a `pad_multiple` of 8.5",
            argue(pad_multiple=8.5),
            "pad_multiple=8.5 is no whole number of 0 or more",
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
    *section(
        "The YAML",
        *(
            refused(f"any option: `{text}`", block(f"{{OPTION: {text}}}"), _OPTION)
            for text in WRONG_VALUES
        ),
        refused("an unknown option", block("{transprot: boundary}"), "did you mean 'transport'?"),
        refused(
            "the block: a list", block("[boundary]"), "is not a mapping; write a block such as"
        ),
        refused("the block: a word", block("boundary"), "is not a mapping; write a block such as"),
        refused("the block: a number", block("2"), "is not a mapping; write a block such as"),
        refused(
            "a misspelled name of the block",
            fields("{context_paralel: {transport: boundary}}"),
            "the block is called context_parallel",
        ),
        refused(
            "a `pad_multiple` that breaks the LCM rule",
            block("{pad_multiple: 12}"),
            "context_parallel.pad_multiple=12 is not a multiple of 8",
        ),
        *(
            refused(f"`compress_ratios`: `{text}`", fields(f"{{compress_ratios: {text}}}"), _RATIOS)
            for text in ("4", "four", "[0, four]", "[0, 4.5]", "[0, -4]", "[0, null]", "[0, .nan]")
        ),
        *(
            refused(f"`sliding_window`: `{text}`", fields(f"{{sliding_window: {text}}}"), _WINDOW)
            for text in ("0", "-128", "12.5", ".nan", "wide", "null")
        ),
        refused(
            "a `cp_size` with more shards than a row of `max_position_embeddings` tokens fills",
            fields("{max_position_embeddings: 8}"),
            "distributed.cp_size=2 cannot work: shards hold a multiple of 8 tokens",
        ),
    ),
    *section(
        "Unusual but valid batches",
        as_meant("ids: int32", remake("input_ids", torch.Tensor.int)),
        as_meant("labels: int32", remake("labels", torch.Tensor.int)),
        as_meant("all tensors: int32", all_tensors(torch.Tensor.int)),
        as_meant("all tensors: column-major in memory", all_tensors(by_columns)),
        as_meant("all tensors: every other element of a longer tensor", all_tensors(every_other)),
        as_meant(
            "all tensors: one row expanded to all rows, with stride 0",
            all_tensors(lambda t: t[:1].expand_as(t)),
            before=one_row_for_all,
        ),
        as_meant(
            "ids: one token expanded to all tokens, with stride 0",
            remake("input_ids", lambda t: t[:1, :1].expand_as(t)),
            plain,
            before=one_token_for_all,
        ),
        as_meant("a `UserDict` instead of a dict", whole(collections.UserDict)),
        as_meant(
            "unknown keys",
            whole(lambda b: b | {"name": "x", "none": None, "more": {"a": 1}, 5: torch.ones(3)}),
        ),
        as_meant("`attention_mask`: bools", remake("attention_mask", torch.Tensor.bool), plain),
        as_meant("`attention_mask`: floats", remake("attention_mask", torch.Tensor.float), plain),
        as_meant("`attention_mask`: int8", remake("attention_mask", torch.Tensor.char), plain),
        as_meant(
            "`attention_mask`: one row for the whole batch",
            remake("attention_mask", lambda t: t[:1]),
            plain,
            before=one_row_for_all,
        ),
        as_meant("`attention_mask`: 4-D, bools", put("attention_mask", square), plain),
        as_meant(
            "`attention_mask`: 4-D, 0 and large negative numbers",
            put("attention_mask", lambda b: additive(square(b))),
            plain,
        ),
        as_meant(
            "`attention_mask`: 4-D, one row for the whole batch",
            put("attention_mask", lambda b: square(b)[:1]),
            plain,
            before=one_row_for_all,
        ),
        as_meant(
            "`padding_mask`: int64 of ones and zeros",
            put("padding_mask", lambda b: 1 - b["attention_mask"]),
            plain,
        ),
        as_meant("no positions", drop("position_ids")),
        as_meant("positions: `None`", put("position_ids", None)),
        as_meant(
            "positions: one row for the whole batch",
            remake("position_ids", lambda t: t[:1]),
            before=one_row_for_all,
        ),
        as_meant(
            "`attention_mask`: any values, if document lengths mark the padding",
            put("attention_mask", lambda b: half_real(b) * NAN),
            packed,
        ),
        as_meant(
            "`cu_seqlens` instead of `seq_lens`",
            both(
                put("cu_seqlens", lambda b: offsets(b["seq_lens"])),
                drop("seq_lens", "seq_lens_padded"),
            ),
            packed,
        ),
        as_meant(
            "`_packed_seq_ids` instead of `seq_lens`",
            both(put("_packed_seq_ids", numbers), drop("seq_lens", "seq_lens_padded")),
            packed,
        ),
        as_meant(
            "`seq_lens`, `cu_seqlens` and `_packed_seq_ids` that agree",
            both(
                put("cu_seqlens", lambda b: offsets(b["seq_lens"])),
                put("_packed_seq_ids", numbers),
            ),
            packed,
        ),
        as_meant(
            "documents without tokens",
            both(
                *(
                    remake(key, lambda t: torch.cat((t, torch.zeros_like(t)), 1))
                    for key in ("seq_lens", "seq_lens_padded")
                )
            ),
            packed,
        ),
        as_meant(
            "lengths: more fill values than rows need",
            both(
                *(
                    remake(key, lambda t: torch.cat((t, torch.full_like(t, NO_DOCUMENT)), 1))
                    for key in ("seq_lens", "seq_lens_padded")
                )
            ),
            packed,
        ),
        as_meant(
            "lengths: of one dimension, for a batch of one row",
            remake("seq_lens", lambda t: t[0]),
            one_packed_row,
        ),
        as_meant(
            "loss mask: bools",
            argue(loss_mask=lambda b: b["labels"] > 0),
            before=argue(loss_mask=lambda b: (b["labels"] > 0).float()),
        ),
        as_meant("`padding_token_id: None`", argue(padding_token_id=None)),
    ),
    *section(
        "Unusual but valid YAML",
        as_meant("no `context_parallel` block", block("null")),
        as_meant("flags: `yes` and `off`", block("{enabled: yes, pad_documents: off}")),
        as_meant("flags: text, and 0", block('{enabled: "true", pad_documents: 0}')),
        as_meant(
            "the same key twice: the last one counts", block("{transport: x, transport: boundary}")
        ),
        as_meant("a `workspace_mib` of 10^12", block("{workspace_mib: 1000000000000}")),
    ),
)
