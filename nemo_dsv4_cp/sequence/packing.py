# SPDX-License-Identifier: Apache-2.0
"""Packed rows: which documents they hold, and the same documents without the padding between them.

# B batch rows   S tokens per row   D documents of the fullest row
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from nemo_dsv4_cp.sequence.lengths import (
    NO_DOCUMENT,
    document_lengths,
    laid_out,
    run_places,
    token_places,
    used_slots_first,
)

TOKEN_IDS = ("packed_seq_ids", "_packed_seq_ids")
"""Keys of a document's number for each token."""

ROW_METADATA = ("seq_lens", "seq_lens_padded", "cu_seqlens", "cu_seqlens_padded")
"""Keys of the documents' lengths or offsets."""


@dataclass(frozen=True)
class Documents:
    """Where the documents of each row lie, in order.

    Attributes:
        starts: First token of each, int64 [B, D].
        lengths: Its real tokens, -1000 in unused slots, which come last.
    """

    starts: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: torch.device | None) -> Documents:
        """Return the same on a device."""
        return Documents(self.starts.to(device), self.lengths.to(device))

    def spans(self) -> list[list[tuple[int, int]]]:
        """Return start and length of each document of each row."""
        pairs = zip(self.starts.tolist(), self.lengths.tolist(), strict=True)
        return [[(s, n) for s, n in zip(*row, strict=True) if n != NO_DOCUMENT] for row in pairs]


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Return whether the rows hold several documents, by any of AutoModel's markers."""
    markers = (*ROW_METADATA, *TOKEN_IDS)
    return batch.get("qkv_format") == "thd" or any(batch.get(key) is not None for key in markers)


def on_cpu_together(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return integer or bool tensors on the CPU as int64, waiting once for each device."""
    found = list(tensors)
    for device in {tensor.device for tensor in tensors}:
        there = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        numbers = torch.cat([tensors[place].reshape(-1).long() for place in there]).cpu()
        parts = numbers.split([tensors[place].numel() for place in there])
        for place, part in zip(there, parts, strict=True):
            found[place] = part.view(tensors[place].shape)
    return found


def documents_of(batch: Mapping[str, Any], rows: int, seq_len: int) -> Documents:
    """Read the documents of each row, those of no token left out; waits once for the device.

    Args:
        batch: Holds ``seq_lens`` [B, D] or [D], with ``seq_lens_padded`` where documents are
            followed by padding; or ``cu_seqlens`` [B, D + 1] or [D + 1], with ``cu_seqlens_padded``
            likewise; or ``_packed_seq_ids`` [B, S], a number per token and 0 for padding. Negative
            fillers end a row's lengths.
        rows: B.
        seq_len: S.

    Raises:
        KeyError: If nothing describes the documents.
        ValueError: If the numbers are not integers, a length is negative, documents do not fit
            their row, or two of these describe different ones.
    """
    tensors = document_tensors(batch, rows, seq_len)
    numbers = on_cpu_together(list(tensors.values()))
    return documents_from(dict(zip(tensors, numbers, strict=True)), seq_len)


def document_tensors(batch: Mapping[str, Any], rows: int, seq_len: int) -> dict[str, torch.Tensor]:
    """Return what describes a batch's documents, [B, D] or [B, S] each, without reading numbers.

    The arguments and errors are those of :func:`documents_of`.
    """
    found: dict[str, torch.Tensor] = {}
    names = [name for name in ("seq_lens", "cu_seqlens") if batch.get(name) is not None]
    for key in (key for name in names for key in (name, f"{name}_padded")):
        if (value := batch.get(key)) is None:
            continue
        if not (_holds_integers(value) and value.dim() in (1, 2)):
            raise ValueError(
                f"{key} is {described(value)}; use int64 [{rows}, D], D integers for each row"
            )
        found[key] = torch.atleast_2d(value)
        if len(found[key]) != rows:
            raise ValueError(f"{key} describes {len(found[key])} rows, and the batch has {rows}")
    for key in TOKEN_IDS:
        if (value := batch.get(key)) is None:
            continue
        if not (_holds_integers(value) and list(value.shape) == [rows, seq_len]):
            raise ValueError(
                f"{key} is {described(value)}; use int64 [{rows}, {seq_len}], an integer per token"
            )
        found[key] = value
    if not found:
        raise KeyError(
            "a packed batch (qkv_format: thd) requires `seq_lens`, `cu_seqlens` or "
            "`_packed_seq_ids`: nothing else describes where its documents end"
        )
    return found


def document_places(
    tensors: Mapping[str, torch.Tensor], seq_len: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's place in its document, int64 [B, S], and whether it is in one.

    Computed from :func:`document_tensors` without waiting for them, so before the numbers are known
    to make sense; of several, the first describes the documents, as in :func:`documents_from`.
    """
    name = next(iter(tensors))
    if name in TOKEN_IDS:
        return run_places(tensors[name].to(device))
    lengths, padded_lengths = (
        document_lengths(name, used_slots_first(name, tensors.get(key, tensors[name]).to(device)))
        for key in (name, f"{name}_padded")
    )
    return token_places(*laid_out(lengths, padded_lengths), seq_len)[1:]


def documents_from(numbers: Mapping[str, torch.Tensor], seq_len: int) -> Documents:
    """Return the documents that :func:`document_tensors`, on the CPU, describe; refuse others."""
    found: dict[str, Documents] = {}
    for name in ("seq_lens", "cu_seqlens"):
        if name in numbers:
            lengths = padded_lengths = _checked_lengths(name, numbers[name])
            if (padded := f"{name}_padded") in numbers:
                padded_lengths = _checked_lengths(padded, numbers[padded])
            found[name] = _fit(name, lengths, padded_lengths, seq_len)
    found |= {name: _runs(numbers[name]) for name in TOKEN_IDS if name in numbers}
    found = {name: _without_empty(documents) for name, documents in found.items()}
    first, *others = found
    for other in others:
        _refuse_contradiction(first, found[first], other, found[other])
    return found[first]


def described(value: Any) -> str:
    """Describe a value for an error message: of a tensor all but its numbers."""
    if not isinstance(value, torch.Tensor):
        return f"of type {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    layout = "" if value.layout is torch.strided else f" ({named(value.layout)})"
    return f"{named(value.dtype)} {list(value.shape)} on {value.device}{layout}"


def named(thing: torch.dtype | torch.layout) -> str:
    """Return the name of a dtype or layout without its module."""
    return str(thing).removeprefix("torch.")


def documents_as_automodel(batch: Mapping[str, Any], rows: int, seq_len: int) -> Documents:
    """Read ``seq_lens`` as AutoModel does, which corrects what :func:`documents_of` refuses.

    Negative lengths count as 0, documents of no token keep their number, a padded length is at
    least the real one, and lengths of rows that the batch lacks are left unread.

    Raises:
        ValueError: If the documents do not fit their row.
    """
    lengths, padded_lengths = (
        used_slots_first("seq_lens", torch.atleast_2d(numbers)[:rows].long().cpu())
        for numbers in (batch["seq_lens"], batch.get("seq_lens_padded", batch["seq_lens"]))
    )
    unused = lengths == NO_DOCUMENT
    lengths = lengths.clamp(min=0)
    missing = (
        lengths.shape[1] - padded_lengths.shape[1]
    )  # a padded length that is missing is the real one
    padded_lengths = (
        pad(padded_lengths, (0, missing)).maximum(lengths).masked_fill(unused, NO_DOCUMENT)
    )
    return _fit("seq_lens", lengths.masked_fill(unused, NO_DOCUMENT), padded_lengths, seq_len)


def _holds_integers(value: Any) -> bool:
    """Whether a value is a tensor of integers that can be read."""
    return (
        isinstance(value, torch.Tensor)
        and not (value.is_nested or value.is_floating_point() or value.is_complex())
        and value.dtype != torch.bool
        and value.layout is torch.strided
        and value.device.type != "meta"
    )


def _checked_lengths(key: str, numbers: torch.Tensor) -> torch.Tensor:
    """Return the lengths that are described, int64 [B, D], -1000 in unused slots, the last."""
    ordered = used_slots_first(key, numbers)
    if not key.startswith("cu_"):
        for row, slot in ((ordered < 0) & (ordered != NO_DOCUMENT)).nonzero().tolist():
            raise ValueError(
                f"{key}: row {row} holds the length {ordered[row, slot]}; lengths are 0 or more, "
                f"and {NO_DOCUMENT} fills up rows of fewer documents"
            )
        return ordered
    used, steps = ordered[:, 1:] >= 0, ordered.diff(dim=1)
    wrong = (ordered[:, :1] != 0).any(dim=1) | (used & (steps < 0)).any(dim=1)
    for row in wrong.nonzero().flatten().tolist():
        raise ValueError(f"{key}: row {row} does not count up from 0: {numbers[row].tolist()}")
    return steps.where(used, NO_DOCUMENT)


def _fit(name: str, lengths: torch.Tensor, padded_lengths: torch.Tensor, seq_len: int) -> Documents:
    """Return where documents lie that are followed by padding; ``padded_lengths`` count it."""
    real, padded = ((each != NO_DOCUMENT).sum(dim=1).tolist() for each in (lengths, padded_lengths))
    for row, counts in enumerate(zip(real, padded, strict=True)):
        if len(set(counts)) > 1:
            raise ValueError(
                f"{name}: row {row} describes {counts[0]} documents, and {name}_padded "
                f"{counts[1]}; use as many numbers in both"
            )
    width = max(1, *real)
    lengths, padded_lengths = (
        pad(each, (0, width - each.shape[1]), value=NO_DOCUMENT)
        for each in (lengths, padded_lengths)
    )
    for row, slot in (lengths > padded_lengths).nonzero().tolist():
        raise ValueError(
            f"{name}: document {slot} of row {row} has {lengths[row, slot]} tokens, and "
            f"{name}_padded gives it {padded_lengths[row, slot]}"
        )
    starts, tokens = laid_out(lengths.clamp(min=0), padded_lengths.clamp(min=0))
    ends = starts + tokens
    for row, slot in ((ends > seq_len) & (lengths != NO_DOCUMENT)).nonzero().tolist():
        raise ValueError(
            f"{name}: the documents of row {row} overrun it: document {slot} ends at token "
            f"{ends[row, slot]} of {seq_len}"
        )
    return Documents(starts, lengths)


def _without_empty(documents: Documents) -> Documents:
    """Leave out documents of no token."""
    used = documents.lengths > 0
    width = max(1, int(used.sum(dim=1).max()))
    order = (~used).byte().argsort(dim=1, stable=True)[:, :width]
    lengths = documents.lengths.where(used, NO_DOCUMENT)
    return Documents(documents.starts.gather(1, order), lengths.gather(1, order))


def _runs(numbers: torch.Tensor) -> Documents:
    """Return the runs of equal numbers [B, S] of each row; those of padding have no token."""
    starts, lengths = [], []
    for row in numbers:
        values, counts = torch.unique_consecutive(row, return_counts=True)
        starts.append(counts.cumsum(0) - counts)
        lengths.append(counts.where(values > 0, 0))
    return Documents(*(pad_sequence(each, batch_first=True) for each in (starts, lengths)))


def _refuse_contradiction(first: str, documents: Documents, other: str, others: Documents) -> None:
    """Refuse documents that a batch describes twice and differently.

    Document numbers may count the padding that follows a document with it, as AutoModel's do.
    """
    for row, (mine, its) in enumerate(zip(documents.spans(), others.spans(), strict=True)):
        padded_length = dict(its)
        within = all(length <= padded_length.get(start, 0) for start, length in mine)
        if not (within if other in TOKEN_IDS else mine == its):
            raise ValueError(
                f"{first} and {other} describe different documents of row {row}; leave one of "
                "them out"
            )


def token_documents(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the number of each token's document in its row, int64 [B, S] from 1; 0 for padding."""
    ids = batch["input_ids"]
    rows, seq_len = ids.shape
    documents = documents_of(batch, rows, seq_len).to(ids.device)
    starts = documents.starts.where(documents.lengths > 0, seq_len)
    slots, _, real = token_places(starts, documents.lengths, seq_len)
    return (slots + 1).where(real, 0)


def tokens_ahead(
    ids: torch.Tensor, depth: int, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the token ``depth`` places ahead of each, 0 where the row or document ends before it.

    ``documents`` are numbers [B, S] that differ between neighboring documents.
    """
    ahead = torch.zeros_like(ids)
    ahead[:, :-depth] = ids[:, depth:]
    if documents is not None:
        other = documents[:, depth:] != documents[:, :-depth]
        ahead[:, :-depth].masked_fill_(other, 0)
    return ahead
