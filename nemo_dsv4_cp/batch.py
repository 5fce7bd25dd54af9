# SPDX-License-Identifier: Apache-2.0
"""The full batch, which every rank has, -> this rank's shard of it.

Checks come first, and while ranks compare their batches no rank raises before all have told
whether they will. After that nothing fails.

# B batch rows   S tokens a row   L local tokens (padded S / R)   R CP ranks
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from nemo_dsv4_cp.automodel.sharding import PackedShardLayout, ShardLayout
from nemo_dsv4_cp.checks.batch import (
    IGNORED_LABEL,
    ROW_METADATA,
    CheckedBatch,
    check_batch,
    primary_key,
)
from nemo_dsv4_cp.checks.consistency import compare_batches, facts_of
from nemo_dsv4_cp.exchange.collectives import CP_GROUP_KEY, Group, max_over_ranks, mesh_rank
from nemo_dsv4_cp.sequence.layout import SequenceLayout, padded_seq_len
from nemo_dsv4_cp.sequence.packing import (
    TOKEN_IDS,
    Document,
    is_packed,
    packed_len,
    repack,
    token_documents,
)

PAD_VALUES: dict[str, float] = {
    "inputs_embeds": 0,
    "labels": IGNORED_LABEL,
    "padding_mask": True,  # True = pad, so that MoE routers skip the slot
    "loss_mask": 0,
}
"""What fills the padding of a per-token tensor; 0 for others, and a token id for ``input_ids``."""

_PACKED_SHARD_MULTIPLE = 8
"""Tokens that a packed shard's length is a multiple of: aligned matrix products, no window."""


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


def pad_tokens(
    batch: dict[str, Any], seq_dims: Mapping[str, int], fills: Mapping[str, float], pad_len: int
) -> None:
    """Append ``pad_len`` slots to each tensor that ``seq_dims`` names; positions keep counting."""
    for key, seq_dim in seq_dims.items():
        if key == "position_ids":
            batch[key] = pad_position_ids(batch[key], seq_dim, pad_len)
        else:
            batch[key] = pad_tensor(batch[key], seq_dim, pad_len, fills.get(key, 0))


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


def _per_token_dims(
    batch: Mapping[str, Any], rows: tuple[int, int], declared: Mapping[str, int]
) -> Iterator[tuple[str, int]]:
    """Yield every per-token tensor of the batch and its sequence dimension."""
    for key, value in batch.items():
        if not isinstance(value, torch.Tensor) or key in ROW_METADATA:
            continue
        if key in declared:
            yield key, declared[key]
        elif tuple(value.shape[:2]) == rows:
            yield key, 1


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
) -> tuple[Callable[..., Any], dict[str, Any], ShardLayout | None]:
    """Pad the rows and keep this rank's contiguous slice of every per-token tensor.

    Packed rows (:func:`nemo_dsv4_cp.sequence.packing.documents_of`) are laid out anew first:
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
        vocab_size: What token ids and labels are below; None leaves that unchecked.

    Returns:
        The forward's context factory (``nullcontext``), the sharded batch with the CP group under
        ``_dsv4_cp_group``, and the lengths before and after padding (None when nothing was cut).

    Raises:
        AssertionError: Unless exactly one of ``input_ids`` and ``inputs_embeds`` is there.
        KeyError: If there are neither labels nor ``loss_mask``, or no documents in a packed batch.
        NotImplementedError: For images.
        ValueError: For all else that could not be cut rightly, such as tensors that do not follow
            the tokens, left padding or lengths that do not fit their row, and for ranks whose
            batches differ or of which one refuses.
    """
    cp_size = 1 if cp_mesh is None else cp_mesh.size()
    if cp_size <= 1:
        return contextlib.nullcontext, _uncut(batch, loss_mask), _uncut_layout(batch)
    checked = _checked(
        batch,
        loss_mask,
        cp_mesh.get_group() if compare_ranks else None,
        vocab_size=vocab_size,
        padding_token_id=padding_token_id,
        pad_multiple=pad_multiple,
    )
    batch["labels"] = checked.labels
    batch.pop("vision_token_types", None)  # all text, or it was refused
    if checked.loss_mask is not None:
        batch["loss_mask"] = checked.loss_mask

    seq_dims = batch.pop("_cp_metadata_seq_dims", {})
    fills = {"input_ids": padding_token_id or 0} | PAD_VALUES
    fills |= batch.pop("_cp_metadata_pad_values", {})
    multiple = max(pad_multiple or 2, 2)
    if checked.documents is not None:
        document_multiple = multiple if pad_documents else 1
        facts = _lay_out_documents(
            batch,
            checked.documents,
            seq_dims,
            fills,
            document_multiple=document_multiple,
            row_multiple=cp_size * (document_multiple if pad_documents else _PACKED_SHARD_MULTIPLE),
            sync_length=sync_packed_length,
        )
    else:
        facts = _pad_rows(
            batch, checked.padding, seq_dims, fills, cp_size=cp_size, pad_multiple=multiple
        )

    assert facts.padded_seq_len is not None
    rows = batch[primary_key(batch)].shape[0]
    layout = SequenceLayout.of_padded(
        facts.padded_seq_len, cp_rank=mesh_rank(cp_mesh), cp_size=cp_size
    )
    for key, seq_dim in list(_per_token_dims(batch, (rows, layout.seq_len), seq_dims)):
        batch[key] = batch[key].narrow(seq_dim, layout.start, layout.local_len).contiguous()
    batch[CP_GROUP_KEY] = cp_mesh.get_group()
    return contextlib.nullcontext, batch, facts


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


def _pad_rows(
    batch: dict[str, Any],
    padding: torch.Tensor | None,
    seq_dims: Mapping[str, int],
    fills: Mapping[str, float],
    *,
    cp_size: int,
    pad_multiple: int,
) -> ShardLayout:
    """Pad rows of one document each at their end."""
    batch.pop("attention_mask", None)
    if padding is not None:
        batch["padding_mask"] = padding
    primary = batch[primary_key(batch)]
    rows, seq_len = primary.shape[:2]
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(seq_len, device=primary.device)[None]
    batch["position_ids"] = positions.expand(rows, -1)
    padded_len = padded_seq_len(seq_len, cp_size=cp_size, pad_multiple=pad_multiple)
    if padded_len > seq_len and padding is None:
        # Unmarked, the slots added here would count when the MoE routers balance their experts.
        batch["padding_mask"] = torch.zeros(rows, seq_len, dtype=torch.bool).to(primary.device)
    per_token = dict(_per_token_dims(batch, (rows, seq_len), seq_dims))
    pad_tokens(batch, per_token, fills, padded_len - seq_len)
    return ShardLayout(original_seq_len=seq_len, padded_seq_len=padded_len)


def _lay_out_documents(
    batch: dict[str, Any],
    documents: Sequence[Sequence[Document]],
    seq_dims: Mapping[str, int],
    fills: Mapping[str, float],
    *,
    document_multiple: int,
    row_multiple: int,
    sync_length: bool,
) -> ShardLayout:
    """Put the documents of packed rows end to end and pad the rows at their end."""
    primary = batch[primary_key(batch)]
    # Documents say what is padding; a mask beside them can only repeat it.
    for key in ("attention_mask", "padding_mask", "position_ids", *TOKEN_IDS, *ROW_METADATA):
        batch.pop(key, None)
    tokens = packed_len(documents, document_multiple)
    return lay_out(
        batch,
        documents,
        dict(_per_token_dims(batch, (primary.shape[0], primary.shape[1]), seq_dims)),
        fills,
        document_multiple=document_multiple,
        padded_len=row_len(tokens, row_multiple, primary.device if sync_length else None),
    )


def row_len(tokens: int, multiple: int, sync_device: torch.device | None) -> int:
    """Round the tokens of the fullest row up; to the longest of all ranks, given a device."""
    padded_len = -(-tokens // multiple) * multiple
    return padded_len if sync_device is None else max_over_ranks(padded_len, sync_device)


def lay_out(
    batch: dict[str, Any],
    documents: Sequence[Sequence[Document]],
    seq_dims: Mapping[str, int],
    fills: Mapping[str, float],
    *,
    document_multiple: int,
    padded_len: int,
) -> PackedShardLayout:
    """Put documents end to end in rows of ``padded_len``, and say in the batch where they lie."""
    primary = batch[primary_key(batch)]
    packed = repack(
        documents,
        seq_len=primary.shape[1],
        document_multiple=document_multiple,
        padded_len=padded_len,
    ).to(primary.device)
    for key, seq_dim in seq_dims.items():
        batch[key] = packed.move(batch[key], seq_dim, fills.get(key, 0))
    batch |= {
        "position_ids": packed.position_ids,
        "padding_mask": packed.source < 0,
        "packed_seq_ids": packed.seq_ids,
        "seq_lens": packed.seq_lens,
        "seq_lens_padded": packed.seq_lens_padded,
        "qkv_format": "thd",
    }
    return PackedShardLayout(padded_seq_len=padded_len, input_token_stream_positions=packed.target)


def _uncut(batch: dict[str, Any], loss_mask: torch.Tensor | None) -> dict[str, Any]:
    """What AutoModel does at CP size 1, and the numbers of packed tokens' documents.

    AutoModel's MTP loss reads them: without them its targets cross into the next document.
    """
    packed = is_packed(batch)
    if packed and "input_ids" in batch and "_packed_seq_ids" not in batch:
        batch["_packed_seq_ids"] = token_documents(batch)
    return uncut(batch, loss_mask, packed=packed)


def uncut(batch: dict[str, Any], loss_mask: torch.Tensor | None, *, packed: bool) -> dict[str, Any]:
    """Mark packing and keep the tokens: what AutoModel does at CP size 1."""
    if packed:
        batch["qkv_format"] = "thd"
    if loss_mask is not None:
        batch["labels" if "labels" not in batch else "loss_mask"] = loss_mask
    return batch


def _uncut_layout(batch: Mapping[str, Any]) -> ShardLayout | None:
    primary = batch.get("input_ids", batch.get("inputs_embeds"))
    if primary is None or primary.dim() < 2:
        return None
    return ShardLayout(original_seq_len=primary.shape[1], padded_seq_len=primary.shape[1])
