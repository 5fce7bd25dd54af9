# SPDX-License-Identifier: Apache-2.0
"""The full batch, which every rank has, -> this rank's shard of it.

All checks run before sharding; sharding a checked batch raises no error. If ranks compare their
batches, an error on one rank is raised on all.

# B batch rows   S tokens per row   L local tokens (padded S / R)   R CP ranks
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nemo_dsv4_cp.automodel.sharding import PackedShardLayout, ShardLayout
from nemo_dsv4_cp.checks.batch import CheckedBatch, check_batch, labels_of, primary_key
from nemo_dsv4_cp.checks.batch_rules import IGNORED_LABEL, padding_of
from nemo_dsv4_cp.checks.consistency import compare_batches, facts_of
from nemo_dsv4_cp.exchange.collectives import CP_GROUP_KEY, Group, max_over_ranks, mesh_rank
from nemo_dsv4_cp.sequence.layout import SequenceLayout, padded_seq_len
from nemo_dsv4_cp.sequence.packing import (
    ROW_METADATA,
    TOKEN_IDS,
    documents_as_automodel,
    is_packed,
    token_documents,
)
from nemo_dsv4_cp.sequence.repacking import packed_len, place_tokens, repack, round_up

PAD_VALUES: dict[str, float] = {
    "inputs_embeds": 0,
    "labels": IGNORED_LABEL,
    "padding_mask": True,  # True = pad, so that MoE routers skip the slot
    "loss_mask": 0,
}
"""What fills the padding of a per-token tensor; 0 for others, and a token id for ``input_ids``."""

_PACKED_SHARD_MULTIPLE = 8
"""Tokens that a packed shard's length is a multiple of, which aligns matrix products."""


def pad_tensor(tensor: torch.Tensor, seq_dim: int, pad_len: int, value: float) -> torch.Tensor:
    """Append ``pad_len`` slots of ``value`` on ``seq_dim``; the tensor itself if there are none."""
    if pad_len <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[seq_dim] = pad_len
    return torch.cat((tensor, tensor.new_full(shape, value)), dim=seq_dim)


def pad_position_ids(position_ids: torch.Tensor, seq_dim: int, pad_len: int) -> torch.Tensor:
    """Append ``pad_len`` positions on ``seq_dim`` that keep counting from each row's last one."""
    if pad_len <= 0:
        return position_ids
    shape = [1] * position_ids.dim()
    shape[seq_dim] = pad_len
    steps = torch.arange(1, pad_len + 1, device=position_ids.device, dtype=position_ids.dtype)
    last = position_ids.narrow(seq_dim, position_ids.shape[seq_dim] - 1, 1)
    return torch.cat((position_ids, last + steps.view(shape)), dim=seq_dim)


def local_token_indices(
    cp_mesh: Any, padded_len: int, device: torch.device | None = None
) -> torch.Tensor:
    """Return the global position of each token of this rank, int64 [L].

    The ``local_token_global_indices`` of AutoModel's ``ContextParallelSharder``.
    """
    layout = SequenceLayout.of_padded(
        padded_len, cp_rank=mesh_rank(cp_mesh), cp_size=cp_mesh.size()
    )
    return layout.positions(device)


def contiguous_shard(
    cp_mesh: Any,
    tp_mesh: Any,
    batch: dict[str, Any],
    *,
    loss_mask: torch.Tensor | None = None,
    padding_token_id: int | None = 0,
    pad_multiple: int | None = None,
    pad_documents: bool = False,
    compare_ranks: bool = False,
    sync_packed_length: bool = False,
    vocab_size: int | None = None,
    strict: bool = True,
) -> tuple[Callable[..., Any], dict[str, Any], ShardLayout | None]:
    """Pad the rows and slice every per-token tensor to this rank's contiguous shard.

    Packed rows (:func:`nemo_dsv4_cp.sequence.packing.documents_of`) are laid out again first:
    documents end to end, padding at the row's end. They gain ``packed_seq_ids`` [B, L] (documents
    counted from 1, 0 for padding) and hold ``seq_lens`` and ``seq_lens_padded`` [B, D] of the new
    rows.

    Args:
        cp_mesh: One-dimensional CP mesh; None or size 1 leaves the tokens as they are.
        tp_mesh: Unused; V4 has no tensor parallelism.
        batch: The full batch, changed in place. Per-token tensors are ``input_ids`` [B, S] or
            ``inputs_embeds`` [B, S, E], ``labels`` [B, S], ``padding_mask`` [B, S], 2-D
            ``attention_mask`` (1 = real) or 4-D (bool, or additive with 0 = attend),
            ``position_ids`` [B, S] or [1, S], whatever else has leading dimensions [B, S], and what
            ``_cp_metadata_seq_dims`` names (key -> sequence dimension, with pad values from
            ``_cp_metadata_pad_values``).
        loss_mask: Optional [B, S]; stands in for labels that the batch lacks, else is sharded too.
        padding_token_id: Pad value of ``input_ids``; None, of a tokenizer without one, gives 0.
        pad_multiple: What each shard's length must be a multiple of (at least 2). Packed rows need
            none but with ``pad_documents``.
        pad_documents: Pad every document to a multiple of ``pad_multiple``, as AutoModel does.
        compare_ranks: Compare the batches over the CP group first, one small collective. What one
            rank refuses is then refused on all; without it, a rank that alone refuses its batch
            leaves the others waiting for it.
        sync_packed_length: Give packed rows one length on all ranks of the job, as AutoModel's
            HybridEP dispatcher needs it.
        vocab_size: Exclusive upper bound of token ids and labels; None leaves that unchecked.
        strict: Check the batch. False accepts and slices what AutoModel's function does
            (:func:`nemo_dsv4_cp.cp.make_dsv4_contiguous_shard_cp_batch_and_ctx`), unchecked.

    Returns:
        The forward's context factory (``nullcontext``), the sharded batch with the CP group under
        ``_dsv4_cp_group``, and the lengths before and after padding (None without tokens).

    Raises:
        AssertionError: Unless exactly one of ``input_ids`` and ``inputs_embeds`` is there.
        KeyError: If there are neither labels nor ``loss_mask``, or no documents in a packed batch.
        NotImplementedError: For images.
        ValueError: For all else that cannot be sharded correctly, such as tensors of other shapes
            than the tokens, left padding or lengths that overrun their row, and for ranks whose
            batches differ or of which one refuses.
    """
    cp_size = 1 if cp_mesh is None else cp_mesh.size()
    if cp_size <= 1:
        _mark(batch, loss_mask, strict=strict)
        return contextlib.nullcontext, batch, _unsharded_layout(batch)
    fills = {"input_ids": padding_token_id or 0} | PAD_VALUES
    dropped = ["attention_mask"]
    if strict:
        checked = _checked(
            batch,
            loss_mask,
            cp_mesh.get_group() if compare_ranks else None,
            vocab_size=vocab_size,
            padding_token_id=padding_token_id,
            pad_multiple=pad_multiple,
        )
        fills |= batch.get("_cp_metadata_pad_values", {})
        dropped += ["vision_token_types", "_cp_metadata_seq_dims", "_cp_metadata_pad_values"]
    else:
        checked = _as_automodel(batch, loss_mask)
    if checked.documents is not None:
        # Documents define what is padding; a mask beside them can only repeat it.
        dropped += ["padding_mask", "position_ids"]
        dropped += [*TOKEN_IDS, *ROW_METADATA] if strict else []
    for key in dropped:
        batch.pop(key, None)
    batch["labels"] = checked.labels
    if checked.loss_mask is not None:
        batch["loss_mask"] = checked.loss_mask

    multiple = max(int(pad_multiple or 2), 2)
    if checked.documents is None:
        facts = _pad_rows(
            batch, checked, fills, cp_size=cp_size, pad_multiple=multiple, mark_padding=strict
        )
    else:
        pad_documents = pad_documents or not strict
        facts = _lay_out_documents(
            batch,
            checked,
            fills,
            document_multiple=multiple if pad_documents else 1,
            row_multiple=cp_size * (multiple if pad_documents else _PACKED_SHARD_MULTIPLE),
            sync_length=sync_packed_length,
        )
    layout = SequenceLayout.of_padded(
        batch[primary_key(batch)].shape[1], cp_rank=mesh_rank(cp_mesh), cp_size=cp_size
    )
    added = {} if checked.documents is None else {"packed_seq_ids": 1}
    for key, seq_dim in (checked.seq_dims | added).items():
        if key in batch:
            shard = (slice(None),) * seq_dim + (slice(layout.start, layout.end),)
            batch[key] = batch[key][shard].contiguous()
    batch[CP_GROUP_KEY] = cp_mesh.get_group()
    return contextlib.nullcontext, batch, facts


def _mark(batch: dict[str, Any], loss_mask: torch.Tensor | None, *, strict: bool) -> None:
    """Do what AutoModel does at CP size 1; if strict, number the documents of packed tokens too.

    AutoModel's MTP loss reads these: without them its targets cross into the next document.
    """
    packed = is_packed(batch) if strict else _automodel_finds_packed(batch)
    if strict and packed and "input_ids" in batch and "_packed_seq_ids" not in batch:
        batch["_packed_seq_ids"] = token_documents(batch)
    if packed:
        batch["qkv_format"] = "thd"
    if loss_mask is not None:
        batch["labels" if "labels" not in batch else "loss_mask"] = loss_mask


def _unsharded_layout(batch: Mapping[str, Any]) -> ShardLayout | None:
    primary = batch.get("input_ids", batch.get("inputs_embeds"))
    if primary is None or primary.dim() < 2:
        return None
    return ShardLayout(original_seq_len=primary.shape[1], padded_seq_len=primary.shape[1])


def _checked(
    batch: Any, loss_mask: torch.Tensor | None, cp_group: Group | None, **settings: Any
) -> CheckedBatch:
    """Check a batch, and given a group compare it; raise on all of its ranks if one refuses."""
    if cp_group is None:
        return check_batch(batch, loss_mask, **settings)
    checked, facts, refusal = None, {}, None
    try:
        checked = check_batch(batch, loss_mask, **settings)
        tensors = {
            "input_ids": batch.get("input_ids"),
            "labels": checked.labels,
            "loss_mask": checked.loss_mask,
            "padding": checked.padding,
        }
        facts = facts_of({k: t for k, t in tensors.items() if t is not None}, checked.documents)
    except Exception as error:  # of any kind: the other ranks wait for this one
        refusal = error
    compare_batches(facts, refusal, cp_group)
    assert checked is not None  # else there was a refusal
    return checked


def _automodel_finds_packed(batch: Mapping[str, Any]) -> bool:
    return batch.get("qkv_format") == "thd" or "seq_lens" in batch or "cu_seqlens" in batch


def _as_automodel(batch: Mapping[str, Any], loss_mask: torch.Tensor | None) -> CheckedBatch:
    """Read a batch as AutoModel's function does, unchecked."""
    packed = _automodel_finds_packed(batch)
    if packed and "seq_lens" not in batch:
        if "cu_seqlens" in batch:
            raise NotImplementedError(
                "a packed batch with `cu_seqlens` alone is refused here, as in AutoModel; add "
                "`seq_lens`, or call nemo_dsv4_cp.batch.contiguous_shard, which reads cu_seqlens"
            )
        raise KeyError("a packed batch (qkv_format: thd) requires `seq_lens` here, as in AutoModel")
    key = primary_key(batch)
    rows, seq_len = batch[key].shape[:2]
    if packed and batch.get("labels") is None:
        raise KeyError("a packed batch needs `labels`; here no loss_mask stands in for them")
    labels, loss_mask = labels_of(batch, loss_mask)
    seq_dims = dict.fromkeys((key, "labels", "padding_mask", "position_ids"), 1)
    if loss_mask is not None:
        seq_dims["loss_mask"] = 1
    if packed:  # labels and loss mask may be longer or shorter than the row
        labels = _fit_row(labels, rows, seq_len, PAD_VALUES["labels"])
        if loss_mask is not None:
            loss_mask = _fit_row(loss_mask, rows, seq_len, PAD_VALUES["loss_mask"])
        documents = documents_as_automodel(batch, rows, seq_len)
        return CheckedBatch(labels, loss_mask, None, documents, seq_dims)
    positions = batch.get("position_ids")
    if positions is not None and positions.dim() == 3:
        seq_dims["position_ids"] = 2
    padding, mask = batch.get("padding_mask"), batch.get("attention_mask")
    if mask is not None and "padding_mask" not in batch:
        padding = padding_of(mask)
    return CheckedBatch(labels, loss_mask, padding, None, seq_dims)


def _fit_row(tensor: torch.Tensor, rows: int, seq_len: int, fill: float) -> torch.Tensor:
    return pad_tensor(tensor, 1, seq_len - tensor.shape[1], fill)[:rows, :seq_len]


def _pad_rows(
    batch: dict[str, Any],
    checked: CheckedBatch,
    fills: Mapping[str, float],
    *,
    cp_size: int,
    pad_multiple: int,
    mark_padding: bool,
) -> ShardLayout:
    """Pad rows of one document each at their end."""
    primary = batch[primary_key(batch)]
    rows, seq_len = primary.shape[:2]
    padded_len = padded_seq_len(seq_len, cp_size=cp_size, pad_multiple=pad_multiple)
    if checked.padding is not None:
        batch["padding_mask"] = checked.padding
    elif mark_padding and padded_len > seq_len:
        # Unmarked, the slots added here would count when the MoE routers balance their experts.
        batch["padding_mask"] = torch.zeros(rows, seq_len, dtype=torch.bool, device=primary.device)
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(seq_len, device=primary.device)[None]
    if positions.dim() == 2 and positions.shape[0] == 1:
        positions = positions.expand(rows, -1)
    batch["position_ids"] = positions
    for key, seq_dim in checked.seq_dims.items():
        if key == "position_ids":
            batch[key] = pad_position_ids(batch[key], seq_dim, padded_len - seq_len)
        elif key in batch:
            fill = fills.get(key, 0)
            batch[key] = pad_tensor(batch[key], seq_dim, padded_len - seq_len, fill)
    return ShardLayout(original_seq_len=seq_len, padded_seq_len=padded_len)


def _lay_out_documents(
    batch: dict[str, Any],
    checked: CheckedBatch,
    fills: Mapping[str, float],
    *,
    document_multiple: int,
    row_multiple: int,
    sync_length: bool,
) -> ShardLayout:
    """Put the documents of packed rows end to end, and describe in the batch where they lie."""
    assert checked.documents is not None
    primary = batch[primary_key(batch)]
    padded_len = round_up(packed_len(checked.documents, document_multiple), row_multiple)
    if sync_length:
        padded_len = max_over_ranks(padded_len, primary.device)
    packed = repack(
        checked.documents,
        seq_len=primary.shape[1],
        document_multiple=document_multiple,
        padded_len=padded_len,
        device=primary.device,
    )
    rows = tuple(packed.target.shape)
    for key, seq_dim in checked.seq_dims.items():
        if key in batch:
            batch[key] = place_tokens(batch[key], packed.source, rows, seq_dim, fills.get(key, 0))
    batch |= {
        "position_ids": packed.position_ids,
        "padding_mask": packed.source < 0,
        "packed_seq_ids": packed.seq_ids,
        "seq_lens": packed.seq_lens,
        "seq_lens_padded": packed.seq_lens_padded,
        "qkv_format": "thd",
    }
    return PackedShardLayout(padded_seq_len=padded_len, input_token_stream_positions=packed.target)
