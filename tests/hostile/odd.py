# SPDX-License-Identifier: Apache-2.0
"""Odd batches and YAML that train as they are meant."""

from __future__ import annotations

import collections

import torch

from nemo_dsv4_cp.sequence.lengths import NO_DOCUMENT
from tests.breaking import (
    NAN,
    additive,
    all_tensors,
    argue,
    as_meant,
    block,
    both,
    by_columns,
    drop,
    every_other,
    half_real,
    numbers,
    offsets,
    one_packed_row,
    one_row_for_all,
    one_token_for_all,
    packed,
    plain,
    put,
    remake,
    section,
    square,
    whole,
)

KINDS = (
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
