# SPDX-License-Identifier: Apache-2.0
"""Whether a full batch can be sharded correctly. Nothing here changes a batch or communicates.

Kinds and shapes are checked at once. What the numbers must obey is a list of rules: whether one is
broken is read from the device in one wait, together with the lengths of packed documents.

# B batch rows   S tokens per row   E hidden size
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_dsv4_cp.checks.batch_rules import (
    Rule,
    counting_rule,
    document_rules,
    id_rule,
    mask_rules,
    padding_of,
    read_together,
    refusal,
    refuse_first,
    valid_ids,
)
from nemo_dsv4_cp.sequence.packing import (
    ROW_METADATA,
    TOKEN_IDS,
    Documents,
    described,
    document_places,
    document_tensors,
    documents_from,
    is_packed,
    named,
)

_IMAGE_KEYS = ("pixel_values", "image_grid_hws", "vision_token_types")
_KNOWN = {
    *("input_ids", "inputs_embeds", "labels", "loss_mask", "position_ids"),
    *("attention_mask", "padding_mask", *TOKEN_IDS, *ROW_METADATA),
}
"""Keys that have checks of their own, or are dropped beside documents."""
_IDS = (torch.int64, torch.int32)  # what an embedding takes
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SIGNED = (*_IDS, torch.int16, torch.int8)  # what holds the label of no token
_FLAGS = (torch.bool, *_SIGNED, torch.uint8)
_LABELS_MASK = "loss_mask, in place of labels,"
_KINDS: dict[str, tuple[torch.dtype, ...]] = {
    "labels": _IDS,
    # Padded with the label of no token, which neither bool nor an unsigned integer holds.
    _LABELS_MASK: (*_SIGNED, *_FLOATS),
    "loss_mask": (*_FLOATS, *_FLAGS),
    "padding_mask": _FLAGS,
    "attention_mask": (*_FLAGS, *_FLOATS),
    "position_ids": _IDS,
}
"""What per-token tensors may hold; errors recommend the first dtype."""
_ONE_ROW_FOR_ALL = ("attention_mask", "position_ids")


@dataclass(frozen=True)
class CheckedBatch:
    """What is known of a batch that can be sharded.

    Attributes:
        labels: [B, S], or the loss mask that stands in for them.
        loss_mask: [B, S], None if there is none beside the labels.
        padding: Bool [B, S], True = pad, of rows of one document each; None without a mask.
        documents: Those of each packed row; None for rows of one document each.
        seq_dims: The sequence dimension of every per-token tensor, by key.
    """

    labels: torch.Tensor
    loss_mask: torch.Tensor | None
    padding: torch.Tensor | None
    documents: Documents | None
    seq_dims: dict[str, int]


def primary_key(batch: Mapping[str, Any]) -> str:
    """Return which tensor holds the tokens.

    Raises:
        AssertionError: Unless exactly one of ``input_ids`` and ``inputs_embeds`` is there.
    """
    present = [key for key in ("input_ids", "inputs_embeds") if key in batch]
    # AssertionError is what AutoModel raises for this, and what its callers may catch.
    assert len(present) == 1, (
        f"a batch must hold exactly one of `input_ids` and `inputs_embeds`, got {present}"
    )
    return present[0]


def labels_of(
    batch: Mapping[str, Any], loss_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the labels, and the loss mask unless it stood in for them.

    Raises:
        KeyError: If there are neither.
    """
    labels = batch.get("labels")
    if labels is None:
        labels, loss_mask = loss_mask, None
    if labels is None:
        raise KeyError(
            "context parallelism needs `labels` in the batch, or labels passed as loss_mask"
        )
    return labels, loss_mask


def check_batch(
    batch: Any,
    loss_mask: torch.Tensor | None,
    *,
    vocab_size: int | None,
    padding_token_id: int | None,
    pad_multiple: int | None,
) -> CheckedBatch:
    """Refuse what :func:`nemo_dsv4_cp.batch.contiguous_shard` could not shard correctly.

    The arguments and errors are those of that function.
    """
    if not isinstance(batch, MutableMapping):
        raise ValueError(
            f"the batch is {described(batch)}; use a dict of tensors, as AutoModel's collaters make"
        )
    rules = _image_rules(batch)
    _check_numbers_to_pad_with(padding_token_id, pad_multiple, vocab_size)
    layout = batch.get("qkv_format")
    if layout not in (None, "bshd", "thd"):
        raise ValueError(
            f"qkv_format={layout!r} is another layout than rows of tokens; use thd for packed "
            "rows, and leave it out for others"
        )
    tokens = _check_tokens(batch)
    labels, weights = labels_of(batch, loss_mask)
    labels_key = "labels" if batch.get("labels") is not None else _LABELS_MASK
    masks = [(labels_key, labels)] if labels_key == _LABELS_MASK else []
    masks += [("loss_mask", mask) for mask in (weights, batch.get("loss_mask")) if mask is not None]
    for key, value in ((labels_key, labels), *masks):
        _check_tensor(key, value, tokens)
    rules += [Rule("finite", key, mask, ~mask.isfinite()) for key, mask in masks]
    by_name = dict.fromkeys(("labels", "loss_mask", "padding_mask", "position_ids"), 1)
    seq_dims = by_name | _per_token_dims(batch, tokens)
    positions = batch.get("position_ids")
    if positions is not None:
        _check_tensor("position_ids", positions, tokens)

    padding = real = None
    lengths: dict[str, torch.Tensor] = {}
    if is_packed(batch):
        lengths = document_tensors(batch, *tokens.shape[:2])
        places, real = document_places(lengths, tokens.shape[1], tokens.device)
        rules += document_rules(positions, labels, places, real)
    else:
        padding, mask_rules = _padding_and_rules(batch, tokens)
        rules += mask_rules
        if positions is not None:
            rules.append(counting_rule(positions, padding))
    if "input_ids" in batch:
        rules.append(id_rule("input_ids", tokens, vocab_size, real))
    if not labels.is_floating_point():  # a loss mask in their place may be
        rules.append(id_rule("labels", labels, vocab_size, None))

    read = read_together(rules, *lengths.values())
    documents = None
    if lengths:
        numbers = dict(zip(lengths, read[len(rules) :], strict=True))
        documents = documents_from(numbers, tokens.shape[1])
        if not (documents.lengths > 0).any():
            raise ValueError("the packed rows hold no document: pack one token at least")
    refuse_first(rules, read[: len(rules)])
    weights = batch.get("loss_mask") if weights is None else weights
    return CheckedBatch(labels, weights, padding, documents, seq_dims)


def _image_rules(batch: Mapping[str, Any]) -> list[Rule]:
    """Refuse images; the token types of text are all -1."""
    found = [key for key in _IMAGE_KEYS if batch.get(key) is not None]
    if found == ["vision_token_types"] and _is_plain(batch[found[0]]):
        types = batch[found[0]].reshape(1, -1)
        return [Rule("images", found[0], types, types >= 0)]
    if found:
        raise refusal("images", key=", ".join(found))
    return []


def check_rows(
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    packed: bool,
) -> None:
    """Refuse rows that a model at CP size 1 cannot attend to: no sharder has checked them.

    Waits for the device once, unless the rows are packed or come without mask and positions.

    Args:
        input_ids: Token ids [B, S].
        attention_mask: [B, S] or [1, S], 1 = real.
        position_ids: [B, S] or [1, S].
        packed: Whether documents are numbered: then padding follows each, and positions restart.

    Raises:
        ValueError: If shapes or dtypes do not fit, if a real token follows padding, or if positions
            do not count 0, 1, 2, ...
    """
    _check_tokens({"input_ids": input_ids})
    if attention_mask is not None:
        _check_tensor("attention_mask", attention_mask, input_ids)
    if position_ids is not None:
        _check_tensor("position_ids", position_ids, input_ids)
    if packed:
        return
    rules: list[Rule] = []
    padding = None
    if attention_mask is not None:
        padding = padding_of(attention_mask)
        rules += mask_rules(attention_mask, padding, None)
    if position_ids is not None:
        rules.append(counting_rule(position_ids, padding))
    if rules:
        refuse_first(rules, read_together(rules))


def _check_numbers_to_pad_with(
    padding_token_id: Any, pad_multiple: Any, vocab_size: int | None
) -> None:
    if padding_token_id is not None and not _is_id(padding_token_id, vocab_size):
        raise ValueError(
            f"padding_token_id={padding_token_id!r} is no token id, {valid_ids(vocab_size)}; set "
            "the tokenizer's pad_token to one of its tokens"
        )
    if pad_multiple is not None and not _is_id(pad_multiple, None):
        raise ValueError(
            f"pad_multiple={pad_multiple!r} is not an integer of 0 or more; use what "
            "dsv4_cp_local_seq_multiple returns for the model, such as 128"
        )


def _is_id(value: Any, vocab_size: int | None) -> bool:
    integer = isinstance(value, int) and not isinstance(value, bool)
    return integer and value >= 0 and (vocab_size is None or value < vocab_size)


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor whose numbers can be read and sliced."""
    return (
        isinstance(value, torch.Tensor)
        and not value.is_nested
        and value.layout is torch.strided
        and value.device.type != "meta"
    )


def _check_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the tensor that holds the tokens, [B, S] or [B, S, E]."""
    key = primary_key(batch)
    value = batch[key]
    kinds, shape = (_IDS, "[B, S]") if key == "input_ids" else (_FLOATS, "[B, S, E]")
    if not (_is_plain(value) and value.dim() == shape.count(",") + 1 and value.dtype in kinds):
        raise ValueError(
            f"{key} is {described(value)}; use {named(kinds[0])} {shape} with data, such as "
            f"{shape.replace('B', '1').replace('S', '4096').replace('E', '4096')}"
        )
    if 0 in value.shape[:2]:
        raise ValueError(
            f"{key} is {described(value)}: no row, or no token in a row; leave such a batch out"
        )
    tokens: torch.Tensor = value
    return tokens


def _check_tensor(key: str, value: Any, tokens: torch.Tensor) -> None:
    """Refuse what does not hold one number per token, of the key's kinds and beside the tokens."""
    kinds, shapes = _KINDS[key], [list(tokens.shape[:2])]
    if key in _ONE_ROW_FOR_ALL:
        shapes.append([1, tokens.shape[1]])
    fits = _is_plain(value) and value.dtype in kinds and value.device == tokens.device
    if not (fits and list(value.shape) in shapes):
        raise ValueError(
            f"{key} is {described(value)}, beside tokens {shapes[0]} on {tokens.device}; use "
            f"{named(kinds[0])} {' or '.join(map(str, shapes))} on {tokens.device}"
        )


def _per_token_dims(batch: Mapping[str, Any], tokens: torch.Tensor) -> dict[str, int]:
    """Return the sequence dimension of each per-token tensor, by shape or as declared.

    Refuses tensors that would be sliced with the tokens and cannot be.
    """
    declared = batch.get("_cp_metadata_seq_dims", {})
    fills = batch.get("_cp_metadata_pad_values", {})
    for name, given, kind in (("seq_dims", declared, int), ("pad_values", fills, int | float)):
        if not (isinstance(given, Mapping) and all(isinstance(n, kind) for n in given.values())):
            raise ValueError(
                f"_cp_metadata_{name}={given!r} is not a mapping of keys to numbers; use such as "
                '{"advantages": 1}'
            )
    rows, seq_len = tokens.shape[:2]
    found = {}
    for key, value in batch.items():
        dim = declared.get(key)
        if not isinstance(value, torch.Tensor) or key in ROW_METADATA:
            continue
        along = not value.is_nested and tuple(value.shape[:2]) == (rows, seq_len)
        if dim is not None and not value.is_nested:
            along = -value.dim() <= dim < value.dim() and value.shape[dim] == seq_len
            if along and is_packed(batch):  # documents are moved within their rows
                along = value.shape[0] == rows and dim % value.dim() > 0
            if not along:
                raise ValueError(
                    f"{key} is {described(value)}, and by _cp_metadata_seq_dims its dimension "
                    f"{dim} follows tokens {[rows, seq_len]}; name the dimension of {seq_len}"
                )
        plain = _is_plain(value) and value.device == tokens.device
        if (key not in _KNOWN or dim is not None) and (value.is_nested or (along and not plain)):
            raise ValueError(
                f"{key} is {described(value)}, beside tokens {[rows, seq_len]} on "
                f"{tokens.device}; use a plain tensor with data on {tokens.device}"
            )
        if along:
            found[key] = 1 if dim is None else dim % value.dim()
    return found


def _padding_and_rules(
    batch: Mapping[str, Any], tokens: torch.Tensor
) -> tuple[torch.Tensor | None, list[Rule]]:
    """Return which tokens are padding, bool [B, S], and what the masks must obey."""
    padding_mask, mask = batch.get("padding_mask"), batch.get("attention_mask")
    if padding_mask is not None:
        _check_tensor("padding_mask", padding_mask, tokens)
        padding_mask = padding_mask.bool()
    if mask is None:
        return padding_mask, []
    if _is_plain(mask) and mask.dim() == 4:
        rows, seq_len = tokens.shape[:2]
        shapes = [[b, 1, seq_len, seq_len] for b in (rows, 1)]
        kinds = (torch.bool, *_FLOATS)
        there = mask.device == tokens.device
        if not (list(mask.shape) in shapes and mask.dtype in kinds and there):
            raise ValueError(
                f"attention_mask is {described(mask)}, beside tokens {[rows, seq_len]} on "
                f"{tokens.device}; use bool {[rows, seq_len]}, True for real tokens"
            )
    else:
        _check_tensor("attention_mask", mask, tokens)
    padding = padding_of(mask).expand(tokens.shape[:2])
    # Only attention_mask shapes attention, in AutoModel at CP size 1 too: a padding_mask that came
    # without one was guessed from token values by its collater and serves the MoE routers alone.
    rules = mask_rules(mask, padding, batch.get("labels"))
    return padding if padding_mask is None else padding_mask, rules
