# SPDX-License-Identifier: Apache-2.0
"""The context-parallel API of DeepSeek-V4, name for name AutoModel's own ``deepseek_v4.cp``.

Each CP rank owns a contiguous shard of every row; attention sees across the cuts. The functions
here take what AutoModel's take, with its result, and hold little logic of their own: padding lives
in ``batch``, documents, positions and the dense reference masks in ``sequence``, communication in
``exchange``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from nemo_dsv4_cp.batch import contiguous_shard
from nemo_dsv4_cp.batch import pad_position_ids as _pad_position_ids_seq_dim_
from nemo_dsv4_cp.batch import pad_tensor as _pad_tensor_seq_dim_
from nemo_dsv4_cp.exchange.collectives import Group, all_gather_metadata
from nemo_dsv4_cp.exchange.collectives import cp_enabled as dsv4_cp_enabled
from nemo_dsv4_cp.exchange.collectives import cp_rank as dsv4_cp_rank
from nemo_dsv4_cp.exchange.collectives import cp_size as dsv4_cp_size
from nemo_dsv4_cp.exchange.gather import all_gather
from nemo_dsv4_cp.sequence.layout import local_seq_multiple
from nemo_dsv4_cp.sequence.lengths import build_packed_seq_ids
from nemo_dsv4_cp.sequence.masks import causal_padding_mask

__all__ = [
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


def _lcm(a: int, b: int) -> int:
    """Return the least common multiple; with a zero, the other number."""
    return math.lcm(a, b) if a and b else max(a, b)


def dsv4_cp_local_seq_multiple(model_or_config: Any) -> int:
    """Return the number that each CP rank's shard length must be a multiple of.

    Args:
        model_or_config: A config with ``compress_ratios`` (a list, None counts as empty), or an
            object that carries such a config as ``config``.

    Returns:
        The LCM over the layers of the ratio (of twice the ratio for ratio 4, whose windows
        overlap); 1 when no layer compresses.
    """
    config = getattr(model_or_config, "config", model_or_config)
    return local_seq_multiple(getattr(config, "compress_ratios", None))


def dsv4_cp_all_gather(tensor: torch.Tensor, *, dim: int, cp_group: Group | None) -> torch.Tensor:
    """All-gather activations in rank order and concatenate them on ``dim``, with autograd.

    Args:
        tensor: This rank's shard, of one shape and dtype on every rank.
        dim: Dimension to concatenate on.
        cp_group: CP group; without CP the tensor is returned as it is.

    Returns:
        The concatenation; its gradient is summed on the ranks that own the slices.
    """
    return all_gather(tensor, dim=dim, cp_group=cp_group)


def dsv4_cp_all_gather_metadata(
    tensor: torch.Tensor | None, *, dim: int, cp_group: Group | None
) -> torch.Tensor | None:
    """All-gather a tensor that carries no gradient, such as a padding mask; None stays None."""
    if tensor is None:
        return None
    return all_gather_metadata(tensor, dim=dim, cp_group=cp_group)


def build_dsv4_cp_causal_padding_mask(
    *,
    position_ids: torch.Tensor,
    key_len: int,
    dtype: torch.dtype,
    device: torch.device,
    cp_group: Group | None,
    padding_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Build the additive mask of local queries against global keys in sequence order.

    Args:
        position_ids: Global positions of the local queries, int [B, L] or [L].
        key_len: S, number of global keys.
        dtype: Floating dtype of the mask.
        device: Device of the mask.
        cp_group: CP group that ``padding_mask`` is gathered over; None without CP.
        padding_mask: This rank's bool [B, L], True = pad; pad keys are masked out.
        sliding_window: W; a query sees the W keys that end with its own. None: all before it.

    Returns:
        [B, 1, L, S] of ``dtype``: 0 where a query may look, ``torch.finfo(dtype).min`` elsewhere.
    """
    return causal_padding_mask(
        torch.atleast_2d(position_ids).to(device=device, dtype=torch.long),
        torch.arange(key_len, device=device)[None],
        dsv4_cp_all_gather_metadata(padding_mask, dim=1, cp_group=cp_group),
        dtype=dtype,
        sliding_window=sliding_window,
    )


def build_dsv4_cp_packed_causal_padding_mask(
    *,
    position_ids: torch.Tensor,
    packed_seq_ids: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    cp_group: Group | None,
    padding_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Build the additive mask of packed rows: queries see their own document's past.

    Args:
        position_ids: Document positions of the local queries, int [B, L] or [L].
        packed_seq_ids: This rank's document numbers, int [B, L] or [L]; 0 sees nothing.
        dtype: Floating dtype of the mask.
        device: Device of the mask.
        cp_group: CP group that the three tensors are gathered over; None without CP.
        padding_mask: This rank's bool [B, L], True = pad; pad keys are masked out.
        sliding_window: W; a query sees the W keys that end with its own. None: all before it.

    Returns:
        [B, 1, L, S] of ``dtype``: 0 where a query may look, ``torch.finfo(dtype).min`` elsewhere.
    """
    positions = torch.atleast_2d(position_ids).to(device=device, dtype=torch.long)
    documents = torch.atleast_2d(packed_seq_ids).to(device=device, dtype=torch.long)
    return causal_padding_mask(
        positions,
        all_gather_metadata(positions, dim=1, cp_group=cp_group),
        dsv4_cp_all_gather_metadata(padding_mask, dim=1, cp_group=cp_group),
        documents=(documents, all_gather_metadata(documents, dim=1, cp_group=cp_group)),
        dtype=dtype,
        sliding_window=sliding_window,
    )


def make_dsv4_contiguous_shard_cp_batch_and_ctx(
    cp_mesh: Any,
    tp_mesh: Any,
    batch: dict[str, Any],
    *,
    loss_mask: torch.Tensor | None = None,
    padding_token_id: int = 0,
    pad_multiple: int | None = None,
    sync_packed_length: bool = False,
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Pad a batch and keep this CP rank's contiguous slice of it, as AutoModel does.

    Accepts what AutoModel's function accepts, with its result: positions as they come, padding
    anywhere, documents padded to ``pad_multiple`` each, tokens of no document left out. Nothing
    here protects attention, which goes by position and supports right padding only; a model's own
    sharder, :func:`nemo_dsv4_cp.batch.contiguous_shard`, does. No communication by default.

    Works on its own, and attached to a batch as ``_cp_make_batch_fn`` with ``functools.partial``.

    Args:
        cp_mesh: One-dimensional CP mesh; size 1 leaves the tokens as they are.
        tp_mesh: Unused; V4 has no tensor parallelism.
        batch: The full batch, changed in place. Cut are ``input_ids`` [B, S] or ``inputs_embeds``
            [B, S, E], ``labels`` and ``padding_mask`` [B, S], and ``position_ids`` [B, S], [1, S],
            [3, B, S] or [B, 3, S]; an ``attention_mask`` becomes the ``padding_mask`` that the
            batch lacks. Packed rows bring ``seq_lens`` and ``seq_lens_padded`` [B, D] or [D], and
            gain ``packed_seq_ids`` [B, L]. Other keys stay as they are.
        loss_mask: Optional [B, S]; stands in for labels that an unpacked batch lacks, else is
            sharded too.
        padding_token_id: Pad value of ``input_ids``.
        pad_multiple: What each shard's length must be a multiple of (at least 2), as
            :func:`dsv4_cp_local_seq_multiple` gives it.
        sync_packed_length: Give packed rows one length on all ranks of the job.

    Returns:
        ``contextlib.nullcontext`` and the batch.

    Raises:
        AssertionError: Unless exactly one of ``input_ids`` and ``inputs_embeds`` is there.
        KeyError: If there are neither labels nor ``loss_mask``, or if a packed batch lacks
            ``labels`` or ``seq_lens``.
        NotImplementedError: For packed batches that hold ``cu_seqlens`` only.
        ValueError: If documents overrun their row.
    """
    return contiguous_shard(
        cp_mesh,
        tp_mesh,
        batch,
        loss_mask=loss_mask,
        padding_token_id=padding_token_id,
        pad_multiple=pad_multiple,
        sync_packed_length=sync_packed_length,
        strict=False,
    )[:2]
