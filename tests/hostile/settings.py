# SPDX-License-Identifier: Apache-2.0
"""Broken YAML, and the error of each."""

from __future__ import annotations

from tests.breaking import (
    WRONG_VALUES,
    block,
    fields,
    refused,
    section,
)

_VALUES = (
    "attention_mask holds ...; 1 is a real token and 0 is padding; describe documents by seq_lens"
)
_RATIOS = "compress_ratios=... is not a list of integers of 0 or more, one per layer"
_WINDOW = "sliding_window=... is not an integer of 1 or more"
_OPTION = "context_parallel.OPTION="

KINDS = (
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
            "a `cp_size` so large that even a row of `max_position_embeddings` tokens leaves some "
            "ranks with only padding",
            fields("{max_position_embeddings: 8}"),
            "distributed.cp_size=2 cannot work: shards hold a multiple of 8 tokens",
        ),
    ),
)
