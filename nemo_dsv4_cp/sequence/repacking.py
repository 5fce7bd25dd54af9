# SPDX-License-Identifier: Apache-2.0
"""Packed rows laid out again: documents end to end, padding at the row's end.

# B batch rows   S tokens per old row   S' per new row   D documents of the fullest row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_dsv4_cp.sequence.lengths import NO_DOCUMENT, token_places
from nemo_dsv4_cp.sequence.packing import Documents


@dataclass(frozen=True)
class Repacked:
    """Where the tokens of packed rows go when their padding is left out.

    Attributes:
        source: Int64 [B, S']: which token of the old row each token is, -1 for padding.
        target: Int64 [B, S]: the reverse, -1 for tokens that were left out.
        position_ids: Int64 [B, S'], counting from 0 in each document; 0 at a row's end.
        seq_ids: Int64 [B, S'], documents counted from 1; 0 for padding at a row's end.
        seq_lens: Int64 [B, D]: real tokens of each document, -1000 for none.
        seq_lens_padded: Int64 [B, D], padding that follows a document included.
    """

    source: torch.Tensor
    target: torch.Tensor
    position_ids: torch.Tensor
    seq_ids: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_padded: torch.Tensor


def repack(
    documents: Documents,
    *,
    seq_len: int,
    document_multiple: int,
    padded_len: int,
    device: torch.device | None = None,
) -> Repacked:
    """Lay documents end to end, each padded to a multiple, in rows of ``padded_len`` tokens."""
    documents = documents.to(device)
    used, lengths = documents.lengths != NO_DOCUMENT, documents.lengths.clamp(min=0)
    padded_lengths = round_up(lengths, document_multiple)
    starts = padded_lengths.cumsum(dim=1) - padded_lengths
    slots, places, inside = token_places(starts, padded_lengths, padded_len)
    real = inside & (places < lengths.gather(1, slots))
    source = (documents.starts.gather(1, slots) + places).where(real, -1)
    return Repacked(
        source=source,
        target=inverse_places(source, seq_len),
        position_ids=places.where(inside, 0),
        seq_ids=(slots + 1).where(inside, 0),
        seq_lens=documents.lengths,
        seq_lens_padded=padded_lengths.where(used, NO_DOCUMENT),
    )


def inverse_places(places: torch.Tensor, length: int) -> torch.Tensor:
    """Return for each of ``length`` places which token goes there, -1 for none; int64."""
    inverse = places.new_full((len(places), length + 1), -1)
    tokens = torch.arange(places.shape[1], device=places.device).expand_as(places)
    # Tokens that are left out all write to the extra place, which is cut off.
    return inverse.scatter(1, places.where(places >= 0, length), tokens)[:, :-1]


def place_tokens(
    tensor: torch.Tensor,
    source: torch.Tensor,
    rows: Sequence[int],
    seq_dim: int,
    fill: float,
) -> torch.Tensor:
    """Return ``tensor[b, source[b, s]]``, ``fill`` where the source is -1; differentiable.

    Raises:
        ValueError: If the tensor has not ``rows`` [B, S] in its first dimension and ``seq_dim``.
    """
    tokens = tensor.movedim(seq_dim, 1)
    if tuple(tokens.shape[:2]) != tuple(rows):
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} does not follow the batch's tokens "
            f"{tuple(rows)} on dimensions 0 and {seq_dim}"
        )
    batch = torch.arange(tokens.shape[0], device=tensor.device)[:, None]
    placed = tokens[batch, source.clamp(min=0)]
    absent = (source < 0).view(*source.shape, *[1] * (tokens.dim() - 2))
    return placed.masked_fill(absent, fill).movedim(1, seq_dim)


def packed_len(documents: Documents, document_multiple: int) -> int:
    """Return the tokens of the fullest row once its documents lie end to end."""
    return int(round_up(documents.lengths.clamp(min=0), document_multiple).sum(dim=1).max())


def round_up(length: Any, multiple: int) -> Any:
    """Return a length, or a tensor of lengths, rounded up to a multiple."""
    return -(-length // multiple) * multiple
