# SPDX-License-Identifier: Apache-2.0
"""What the lengths of packed rows say, computed on their device without waiting for it."""

# B batch rows   S tokens per row   D documents of the fullest row

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nemo_dsv4_cp.sequence.packing import NO_DOCUMENT


def document_starts(batch: Mapping[str, Any], rows: int, seq_len: int) -> torch.Tensor | None:
    """Return where documents start in rows that stay as they are, without waiting for the device.

    Padding counts with the document before it, as in AutoModel; what follows the last is a document
    of its own.

    Args:
        batch: As for :func:`nemo_dsv4_cp.sequence.packing.documents_of`, but for numbers a token.
        rows: B.
        seq_len: S, tokens of the whole row.

    Returns:
        Int64 [B, D + 1] on the lengths' device, S in unused slots; None if no lengths are there.
    """
    lengths = _lengths_on_device(batch, padded=True)
    if lengths is None:
        return None
    starts = torch.nn.functional.pad(lengths.cumsum(dim=1), (1, 0))
    return starts.clamp(max=seq_len).expand(rows, -1)


def packed_padding(batch: Mapping[str, Any], rows: int, seq_len: int) -> torch.Tensor | None:
    """Return which tokens of packed rows are padding, no wait for the device.

    Padding follows a document, up to its padded length, and the row's last document.

    Args:
        batch: As for :func:`document_starts`.
        rows: B.
        seq_len: S, tokens of the whole row.

    Returns:
        Bool [B, S], True = pad, on the lengths' device; None if no lengths are there.
    """
    padded = _lengths_on_device(batch, padded=True)
    real = _lengths_on_device(batch, padded=False)
    if padded is None:
        return None
    real = padded if real is None else real
    ends = padded.cumsum(dim=1).expand(rows, -1).contiguous()
    tokens = torch.arange(seq_len, device=ends.device).expand(rows, -1).contiguous()
    # A place past the last document, of no real token, for what follows it.
    real_ends = torch.nn.functional.pad(ends - padded + real, (0, 1))
    return tokens >= real_ends.gather(1, torch.searchsorted(ends, tokens, right=True))


def _lengths_on_device(batch: Mapping[str, Any], *, padded: bool) -> torch.Tensor | None:
    """Return the documents' lengths, int64 [B or 1, D], 0 in unused slots; None without any."""
    for name, from_offsets in (("seq_lens", False), ("cu_seqlens", True)):
        for key in (f"{name}_padded", name) if padded else (name,):
            if (found := batch.get(key)) is not None:
                numbers: torch.Tensor = torch.atleast_2d(found).long()
                return (numbers.diff(dim=-1) if from_offsets else numbers).clamp(min=0)
    return None


def build_packed_seq_ids(
    seq_lens_padded: torch.Tensor,
    *,
    seq_len: int,
    device: torch.device,
    padding_value: int = NO_DOCUMENT,
) -> torch.Tensor:
    """Number each token's document in its row, padding that follows it included.

    Args:
        seq_lens_padded: Int [B, D] or [D]; ``padding_value`` fills up rows of fewer documents.
        seq_len: S, tokens a row; longer documents are cut off.
        device: Where the result lives.
        padding_value: Marks unused slots.

    Returns:
        Int64 [B, S] from 1; 0 after the last document (AutoModel's ``build_packed_seq_ids``).
    """
    lengths = torch.atleast_2d(seq_lens_padded).to(device=device, dtype=torch.long)
    used = lengths != padding_value
    ends = lengths.clamp(min=0).where(used, 0).cumsum(dim=1)
    tokens = torch.arange(seq_len, device=device).expand(lengths.shape[0], -1).contiguous()
    slot = torch.searchsorted(ends, tokens, right=True)
    numbers = used.long().cumsum(dim=1)
    inside = slot < lengths.shape[1]
    seq_ids: torch.Tensor = numbers.gather(1, slot.clamp(max=lengths.shape[1] - 1))
    return seq_ids.where(inside, 0)
