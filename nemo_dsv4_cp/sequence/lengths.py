# SPDX-License-Identifier: Apache-2.0
"""Where the documents of packed rows lie, computed on their device without waiting for it."""

# B batch rows   S tokens per row   D documents of the fullest row

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

NO_DOCUMENT = -1000
"""Fills up rows of fewer documents, as in AutoModel's packed collater."""


def document_starts(batch: Mapping[str, Any], rows: int, seq_len: int) -> torch.Tensor | None:
    """Return where documents start in rows that stay as they are, without waiting for the device.

    Padding counts with the document before it, as in AutoModel; what follows the last is a document
    of its own.

    Args:
        batch: As for :func:`nemo_dsv4_cp.sequence.packing.documents_of`, except document numbers.
        rows: B.
        seq_len: S, tokens of the whole row.

    Returns:
        Int64 [B, D + 1] on the lengths' device, S in unused slots; None if no lengths are there.
    """
    lengths = _lengths(batch, padded=True)
    if lengths is None:
        return None
    starts = pad(lengths.cumsum(dim=1), (1, 0))
    return starts.clamp(max=seq_len).expand(rows, -1)


def aligned_starts(numbers: torch.Tensor, alignment: int) -> torch.Tensor:
    """Return where documents start, by the number of each token's document; waits for the device.

    Args:
        numbers: Int [B, S]; 0 for padding, which counts with the document before it up to the next
            multiple of ``alignment``.
        alignment: What all documents' starts are multiples of.

    Returns:
        Int64 [B, D], ascending from 0; S in unused slots.
    """
    of_groups = numbers[:, ::alignment]
    first = pad(of_groups[:, 1:] != of_groups[:, :-1], (1, 0), value=True)
    places = torch.arange(of_groups.shape[1], device=numbers.device) * alignment
    starts = torch.where(first, places, numbers.shape[1]).sort(dim=1).values
    return starts[:, : int(first.sum(dim=1).max())]


def packed_padding(batch: Mapping[str, Any], rows: int, seq_len: int) -> torch.Tensor | None:
    """Return which tokens of packed rows are padding, bool [B, S]; None without lengths.

    Padding follows a document, up to its padded length, and the row's last document. The arguments
    are those of :func:`document_starts`; it does not wait for the device either.
    """
    padded_lengths, lengths = _lengths(batch, padded=True), _lengths(batch, padded=False)
    if padded_lengths is None:
        return None
    starts, lengths = laid_out(padded_lengths if lengths is None else lengths, padded_lengths)
    return ~token_places(starts.expand(rows, -1), lengths.expand(rows, -1), seq_len)[2]


def _lengths(batch: Mapping[str, Any], *, padded: bool) -> torch.Tensor | None:
    """Return the documents' lengths, int64 [B or 1, D], 0 in unused slots; None without any."""
    for name in ("seq_lens", "cu_seqlens"):
        for key in (f"{name}_padded", name) if padded else (name,):
            if batch.get(key) is not None:
                return document_lengths(key, batch[key])
    return None


def document_lengths(key: str, numbers: torch.Tensor) -> torch.Tensor:
    """Return the lengths, int64 [B, D], of a batch's lengths or offsets; 0 in unused slots."""
    numbers = torch.atleast_2d(numbers).long()
    return (numbers.diff(dim=1) if key.startswith("cu_") else numbers).clamp(min=0)


def used_slots_first(key: str, numbers: torch.Tensor) -> torch.Tensor:
    """Return lengths or offsets [B, D] with the unused slots of each row last."""
    used = numbers >= 0 if key.startswith("cu_") else numbers != NO_DOCUMENT
    return numbers.gather(1, (~used).byte().argsort(dim=1, stable=True))


def laid_out(
    lengths: torch.Tensor, padded_lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first token and the real tokens of documents, int64 [B, D] each.

    ``padded_lengths`` count the padding that follows a document too, and may have another D.
    """
    slots = max(1, lengths.shape[1], padded_lengths.shape[1])
    lengths, padded_lengths = (
        pad(each, (0, slots - each.shape[1])) for each in (lengths, padded_lengths)
    )
    return padded_lengths.cumsum(dim=1) - padded_lengths, lengths


def token_places(
    starts: torch.Tensor, lengths: torch.Tensor, seq_len: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each token's document and its place in it, int64 [B, S], and whether it is real.

    Documents are ascending first tokens and real tokens, int64 [B, D]; none in unused slots.
    """
    tokens = torch.arange(seq_len, device=starts.device).expand(len(starts), -1).contiguous()
    slots = (torch.searchsorted(starts.contiguous(), tokens, right=True) - 1).clamp(min=0)
    places = tokens - starts.gather(1, slots)
    return slots, places, (places >= 0) & (places < lengths.gather(1, slots))


def run_places(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's place in its document and whether it has one, by document numbers."""
    tokens = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers)
    first = pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    return tokens - (tokens * first).cummax(dim=1).values, numbers > 0


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
        seq_len: S, tokens per row; longer documents are cut off.
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
