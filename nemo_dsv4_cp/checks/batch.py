# SPDX-License-Identifier: Apache-2.0
"""Whether a full batch can be cut rightly. Nothing here changes a batch, and nothing communicates.

# B batch rows   S tokens a row   E hidden size
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_dsv4_cp.sequence.packing import (
    TOKEN_IDS,
    Document,
    check_tokens,
    described,
    documents_of,
    is_packed,
    named,
    token_numbers,
)

ROW_METADATA = ("seq_lens", "seq_lens_padded", "cu_seqlens", "cu_seqlens_padded")
IGNORED_LABEL = -100
"""The label of tokens that AutoModel's losses ignore."""

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


@dataclass(frozen=True)
class CheckedBatch:
    """What was learned of a batch that can be cut.

    Attributes:
        labels: [B, S], or the loss mask that stands in for them.
        loss_mask: [B, S], None if there is none beside the labels.
        padding: Bool [B, S], True = pad, of rows of one document each; None where nothing tells.
        documents: Those of each packed row; None for rows of one document each.
    """

    labels: torch.Tensor
    loss_mask: torch.Tensor | None
    padding: torch.Tensor | None
    documents: Sequence[Sequence[Document]] | None


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


def padding_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Read either form of attention mask as AutoModel does.

    Args:
        attention_mask: [B, S], nonzero = real; or [B, 1, S, S], bool (True = attend) or additive
            (0 = attend), of which the diagonal tells.

    Returns:
        Bool [B, S], True = pad.
    """
    if attention_mask.dim() == 4:
        diagonal = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return ~diagonal if attention_mask.dtype == torch.bool else diagonal != 0
    return ~attention_mask.bool()


def check_batch(
    batch: Any,
    loss_mask: torch.Tensor | None,
    *,
    vocab_size: int | None,
    padding_token_id: int | None,
    pad_multiple: int | None,
) -> CheckedBatch:
    """Refuse what :func:`nemo_dsv4_cp.batch.contiguous_shard` could not cut rightly.

    The arguments are those of that function.

    Raises:
        AssertionError: Unless exactly one of ``input_ids`` and ``inputs_embeds`` is there.
        KeyError: If there are neither labels nor ``loss_mask``, or no documents in a packed batch.
        NotImplementedError: For images.
        ValueError: For all else, with the key, what it holds and what it may hold.
    """
    if not isinstance(batch, MutableMapping):
        raise ValueError(
            f"the batch is {described(batch)}; use a dict of tensors, as AutoModel's collaters make"
        )
    _refuse_images(batch)
    _check_numbers_to_pad_with(padding_token_id, pad_multiple, vocab_size)
    layout = batch.get("qkv_format")
    if layout not in (None, "bshd", "thd"):
        raise ValueError(
            f"qkv_format={layout!r} is another layout than rows of tokens; use thd for packed "
            "rows, and leave it out for others"
        )
    tokens = _check_tokens(batch)
    labels, weights = _check_targets(batch, loss_mask, tokens)
    _check_other_tensors(batch, tokens)
    positions = batch.get("position_ids")
    if positions is not None:
        _check_tensor("position_ids", positions, tokens, _IDS, one_row_will_do=True)

    documents = padding = real = None
    if is_packed(batch):
        documents = documents_of(batch, *tokens.shape[:2])
        if not any(documents):
            raise ValueError("the packed rows hold no document: pack one token at least")
        check_tokens(documents, positions, labels)
        real = (token_numbers(documents, tokens.shape[1]) > 0).to(tokens.device)
    else:
        padding = _check_padding(batch, tokens)
        if positions is not None:
            refuse_restarting_positions(positions, padding)
    if "input_ids" in batch:
        _check_ids("input_ids", tokens, vocab_size, only=real)
    if not labels.is_floating_point():  # a loss mask in their place may be
        _check_ids("labels", labels, vocab_size, but=IGNORED_LABEL)
    return CheckedBatch(labels, weights, padding, documents)


def _refuse_images(batch: Mapping[str, Any]) -> None:
    found = [key for key in _IMAGE_KEYS if _shows_images(key, batch.get(key))]
    if found:
        raise NotImplementedError(
            f"images ({', '.join(found)} in the batch) are not supported under context "
            "parallelism; set distributed.cp_size: 1"
        )


def _shows_images(key: str, value: Any) -> bool:
    """Return whether a value says that there are images; token types of text are all -1."""
    if key == "vision_token_types" and _is_plain(value):
        return bool((value >= 0).any())
    return value is not None


def _check_numbers_to_pad_with(
    padding_token_id: Any, pad_multiple: Any, vocab_size: int | None
) -> None:
    if padding_token_id is not None and not _is_id(padding_token_id, vocab_size):
        raise ValueError(
            f"padding_token_id={padding_token_id!r} is no token id, {_ids(vocab_size)}; set the "
            "tokenizer's pad_token to one of its tokens"
        )
    if pad_multiple is not None and not _is_id(pad_multiple, None):
        raise ValueError(
            f"pad_multiple={pad_multiple!r} is no whole number of 0 or more; use what "
            "dsv4_cp_local_seq_multiple gives for the model, such as 128"
        )


def _is_id(value: Any, vocab_size: int | None) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and value >= 0 and (vocab_size is None or value < vocab_size)


def _ids(vocab_size: int | None) -> str:
    return "0 or more" if vocab_size is None else f"0 to {vocab_size - 1}"


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor whose numbers can be read and cut."""
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


def _check_tensor(
    key: str,
    value: Any,
    tokens: torch.Tensor,
    kinds: Sequence[torch.dtype],
    *,
    one_row_will_do: bool = False,
) -> None:
    """Refuse what is not one number a token, of one of ``kinds`` and beside the tokens."""
    shapes = [list(tokens.shape[:2])]
    if one_row_will_do:
        shapes.append([1, tokens.shape[1]])
    fits = _is_plain(value) and value.dtype in kinds and value.device == tokens.device
    if not (fits and list(value.shape) in shapes):
        raise ValueError(
            f"{key} is {described(value)}, beside tokens {shapes[0]} on {tokens.device}; use "
            f"{named(kinds[0])} {' or '.join(map(str, shapes))} on {tokens.device}"
        )


def _check_targets(
    batch: Mapping[str, Any], loss_mask: Any, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return labels and loss mask, or the loss mask as labels."""
    labels, weights = labels_of(batch, loss_mask)
    if batch.get("labels") is None:
        # Padded with the label of no token, which neither bool nor an unsigned number holds.
        key = "loss_mask, in place of labels,"
        _check_tensor(key, labels, tokens, (*_SIGNED, *_FLOATS))
        _refuse_nan(key, labels)
    else:
        _check_tensor("labels", labels, tokens, _IDS)
    for mask in (weights, batch.get("loss_mask")):
        if mask is not None:
            _check_tensor("loss_mask", mask, tokens, (*_FLOATS, *_FLAGS))
            _refuse_nan("loss_mask", mask)
    return labels, batch.get("loss_mask") if weights is None else weights


def _refuse_nan(key: str, numbers: torch.Tensor) -> None:
    _refuse_where(
        ~numbers.isfinite(), numbers, key, "use finite numbers, 0 for tokens without a loss"
    )


def _refuse_where(wrong: torch.Tensor, numbers: torch.Tensor, key: str, remedy: str) -> None:
    """Refuse the first number [B, S] that is wrong."""
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{key} holds {numbers[row, token].item()} for token {token} of row {row}; {remedy}"
        )


def _check_ids(
    key: str,
    numbers: torch.Tensor,
    vocab_size: int | None,
    *,
    but: int | None = None,
    only: torch.Tensor | None = None,
) -> None:
    """Refuse numbers that are no token ids: an embedding or a loss on a GPU dies of them."""
    wrong = numbers < 0
    if vocab_size is not None:
        wrong = wrong | (numbers >= vocab_size)
    if but is not None:
        wrong = wrong & (numbers != but)
    if only is not None:
        wrong = wrong & only
    also = "" if but is None else f", and {but} for none"
    _refuse_where(wrong, numbers, key, f"token ids are {_ids(vocab_size)}{also}")


def _check_other_tensors(batch: Mapping[str, Any], tokens: torch.Tensor) -> None:
    """Refuse tensors that would be cut with the tokens and cannot be."""
    declared = batch.get("_cp_metadata_seq_dims", {})
    fills = batch.get("_cp_metadata_pad_values", {})
    for name, told, kind in (("seq_dims", declared, int), ("pad_values", fills, int | float)):
        if not (isinstance(told, Mapping) and all(isinstance(n, kind) for n in told.values())):
            raise ValueError(
                f"_cp_metadata_{name}={told!r} is not a mapping of keys to numbers; use such as "
                '{"advantages": 1}'
            )
    rows, seq_len = tokens.shape[:2]
    for key, value in batch.items():
        dim = declared.get(key)
        if not isinstance(value, torch.Tensor) or (key in _KNOWN and dim is None):
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
        if value.is_nested or (along and not (_is_plain(value) and value.device == tokens.device)):
            raise ValueError(
                f"{key} is {described(value)}, beside tokens {[rows, seq_len]} on "
                f"{tokens.device}; use a plain tensor with data on {tokens.device}"
            )


def _check_padding(batch: Mapping[str, Any], tokens: torch.Tensor) -> torch.Tensor | None:
    """Return which tokens are padding, bool [B, S]; None where nothing tells."""
    padding_mask, attention_mask = batch.get("padding_mask"), batch.get("attention_mask")
    if padding_mask is not None:
        _check_tensor("padding_mask", padding_mask, tokens, _FLAGS)
    if attention_mask is None:
        return None if padding_mask is None else padding_mask.bool()
    if _is_plain(attention_mask) and attention_mask.dim() == 4:
        _check_square_mask(attention_mask, tokens)
    else:
        kinds = (*_FLAGS, *_FLOATS)
        _check_tensor("attention_mask", attention_mask, tokens, kinds, one_row_will_do=True)
        remedy = "1 is a real token and 0 is padding; tell documents by seq_lens"
        wrong = (attention_mask != 0) & (attention_mask != 1)
        _refuse_where(wrong, attention_mask, "attention_mask", remedy)
    padding = padding_of(attention_mask).expand(tokens.shape[:2])
    refuse_left_padding(padding)
    if (labels := batch.get("labels")) is not None:
        lost = padding.all(dim=1, keepdim=True) & (labels != IGNORED_LABEL)
        remedy = f"attention_mask says that the row is all padding, whose label is {IGNORED_LABEL}"
        _refuse_where(lost, labels, "labels", remedy)
    # Only attention_mask shapes attention, in AutoModel at CP size 1 too: a padding_mask that came
    # without one was guessed from token values by its collater and serves the MoE routers alone.
    return padding if padding_mask is None else padding_mask.bool()


def _check_square_mask(mask: torch.Tensor, tokens: torch.Tensor) -> None:
    """Refuse a 4-D mask that says more than what attention does anyhow, and where padding is.

    Attention sees all of its row's past. The first token's row and column tell most others apart:
    bidirectional ones, prefixes, windows, packed documents.
    """
    rows, seq_len = tokens.shape[:2]
    shapes = [[b, 1, seq_len, seq_len] for b in dict.fromkeys((rows, 1))]
    kinds = (torch.bool, *_FLOATS)
    if not (list(mask.shape) in shapes and mask.dtype in kinds and mask.device == tokens.device):
        raise ValueError(
            f"attention_mask is {described(mask)}, beside tokens {[rows, seq_len]} on "
            f"{tokens.device}; use bool {[rows, seq_len]}, True for real tokens"
        )
    if mask.dtype != torch.bool:
        own = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        remedy = "in a 4-D mask of floats 0 is seen and a negative number is not; use bool"
        _refuse_where(own.isnan() | (own > 0), own, "attention_mask", remedy)
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    real = ~padding_of(mask)
    remedy = "attention sees the row's whole past and nothing else; tell documents by seq_lens"
    _refuse_where(real & ~seen[:, :, 0], seen[:, :, 0], "attention_mask, of the first key,", remedy)
    ahead = seen[:, 0].clone()
    ahead[:, 0] = False
    _refuse_where(ahead & real[:, :1], ahead, "attention_mask, of the first query,", remedy)


def refuse_left_padding(padding_mask: torch.Tensor) -> None:
    """Refuse rows in which a real token follows padding.

    Attention sees positions, not masks: with padding only at the end no real query ever sees a pad
    token, anywhere else it would.

    Args:
        padding_mask: Bool [B, S], True = pad, of whole rows.

    Raises:
        ValueError: If a row is not right-padded.
    """
    real_after_pad = (padding_mask[:, :-1] & ~padding_mask[:, 1:]).any(dim=1)
    if bool(real_after_pad.any()):
        row = int(real_after_pad.nonzero()[0])
        raise ValueError(
            f"attention_mask: row {row} of the batch has real tokens after padding; attention here "
            "goes by position and supports right padding only. Set the tokenizer's or collator's "
            'padding_side to "right"'
        )


def refuse_restarting_positions(
    position_ids: torch.Tensor, padding_mask: torch.Tensor | None
) -> None:
    """Refuse 2-D positions that do not count 0, 1, 2, ... over the real tokens of each row.

    Args:
        position_ids: Int [B, S], of whole rows.
        padding_mask: Bool [B, S], True = pad; None if every token is real.

    Raises:
        ValueError: If a row restarts or starts elsewhere, as unmarked packed documents do.
    """
    counting = torch.arange(position_ids.shape[1], device=position_ids.device)
    astray = position_ids != counting
    if padding_mask is not None:
        astray = astray & ~padding_mask.bool()
    if bool(astray.any()):
        raise ValueError(
            "position_ids do not count 0, 1, 2, ... along each row, as if documents were packed; "
            "leave position_ids out of the batch, or tell the documents' lengths with seq_lens"
        )
