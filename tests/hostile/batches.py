# SPDX-License-Identifier: Apache-2.0
"""Batches whose tokens, labels, masks or positions are broken, and the error of each."""

from __future__ import annotations

import torch

from tests.breaking import (
    NAN,
    VOCAB,
    all_tensors,
    another_row,
    argue,
    at,
    both,
    drop,
    embedded,
    half_real,
    longer,
    nested,
    packed,
    plain,
    put,
    refused,
    remake,
    section,
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
_VALUES = (
    "attention_mask holds ...; 1 is a real token and 0 is padding; describe documents by seq_lens"
)
_SIDE = 'has real tokens after padding; ... padding_side to "right"'
_PAST = "attention sees the row's whole past and nothing else; describe documents by seq_lens"
_PLACES = "position_ids is ..., beside tokens ...; use int64 ["
_COUNT = "position_ids do not count 0, 1, 2, ... along each row, as if documents were packed"

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
            "labels holds ...; attention_mask marks the whole row as padding",
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
)
