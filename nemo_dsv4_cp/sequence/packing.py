# SPDX-License-Identifier: Apache-2.0
"""Packed rows: which documents they hold, and the same documents without the padding between them.

# B batch rows   S tokens per row   D documents of the fullest row
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

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
class Document:
    """The real tokens of one document of a row: ``length`` tokens from ``start`` on."""

    start: int
    length: int


Rows = Sequence[Sequence[Document]]
"""The documents of each row of a batch."""


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


def documents_of(batch: Mapping[str, Any], rows: int, seq_len: int) -> list[list[Document]]:
    """Read the documents of each row, waiting once for the device.

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
    for name in ("seq_lens", "cu_seqlens"):
        if batch.get(name) is None:
            continue
        for key in (name, f"{name}_padded"):
            if (value := batch.get(key)) is None:
                continue
            if not (_holds_integers(value) and value.dim() in (1, 2)):
                raise ValueError(
                    f"{key} is {described(value)}; use int64 [{rows}, D], D integers for each row"
                )
            found[key] = torch.atleast_2d(value)
            if len(found[key]) != rows:
                raise ValueError(
                    f"{key} describes {len(found[key])} rows, and the batch has {rows}"
                )
    for key in TOKEN_IDS:
        if (value := batch.get(key)) is not None:
            if not (_holds_integers(value) and list(value.shape) == [rows, seq_len]):
                raise ValueError(
                    f"{key} is {described(value)}; use int64 [{rows}, {seq_len}], an integer per "
                    "token"
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

    Computed on the device without waiting for it, before the numbers are known to make sense; from
    the first tensor, which :func:`documents_from` reads first too.

    Args:
        tensors: From :func:`document_tensors`.
        seq_len: S.
        device: Where the result lives.
    """
    name = next(iter(tensors))
    if name in TOKEN_IDS:
        return run_places(tensors[name].to(device))
    lengths, rooms = (
        document_lengths(name, used_slots_first(name, tensors.get(key, tensors[name]).to(device)))
        for key in (name, f"{name}_padded")
    )
    return token_places(*laid_out(lengths, rooms), seq_len)[1:]


def documents_from(numbers: Mapping[str, torch.Tensor], seq_len: int) -> list[list[Document]]:
    """Return the documents that the numbers of :func:`document_tensors` describe.

    Args:
        numbers: The same tensors on the CPU.
        seq_len: S.

    Raises:
        ValueError: As :func:`documents_of` does.
    """
    described_by: dict[str, list[list[Document]]] = {}
    for name, read in (("seq_lens", _lengths), ("cu_seqlens", _steps)):
        if name not in numbers:
            continue
        real = read(numbers[name].tolist(), name)
        padded = f"{name}_padded"
        rooms = read(numbers[padded].tolist(), padded) if padded in numbers else real
        described_by[name] = [
            _fit(real[row], rooms[row], row, name, seq_len) for row in range(len(real))
        ]
    for name in TOKEN_IDS:
        if name in numbers:
            described_by[name] = [_runs(row) for row in numbers[name]]
    first, *others = described_by
    for other in others:
        _refuse_contradiction(first, other, described_by)
    return described_by[first]


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


def documents_as_automodel(batch: Mapping[str, Any], rows: int, seq_len: int) -> Rows:
    """Read ``seq_lens`` as AutoModel does, which corrects what :func:`documents_of` refuses.

    Negative lengths count as 0, documents of no token keep their number, a padded length is at
    least the real one, and lengths of rows that the batch lacks are left unread.

    Args:
        batch: Holds ``seq_lens`` [B, D] or [D], and ``seq_lens_padded`` likewise or not at all.
        rows: B.
        seq_len: S.

    Raises:
        IndexError: If rows have no lengths.
        ValueError: If the documents do not fit their row.
    """
    real = torch.atleast_2d(batch["seq_lens"]).long().tolist()
    padded = torch.atleast_2d(batch.get("seq_lens_padded", batch["seq_lens"])).long().tolist()
    documents = []
    for row in range(rows):
        lengths = [max(n, 0) for n in real[row] if n != NO_DOCUMENT]
        rooms = [n for n in padded[row] if n != NO_DOCUMENT]
        rooms = [max(pair) for pair in zip(rooms, lengths, strict=False)]
        documents.append(_laid_out(lengths, rooms, row, "seq_lens", seq_len))
    return documents


def _holds_integers(value: Any) -> bool:
    """Whether a value is a tensor of integers that can be read."""
    return (
        isinstance(value, torch.Tensor)
        and not (value.is_nested or value.is_floating_point() or value.is_complex())
        and value.dtype != torch.bool
        and value.layout is torch.strided
        and value.device.type != "meta"
    )


def _lengths(rows: Sequence[Sequence[int]], key: str) -> list[list[int]]:
    found = [[n for n in numbers if n != NO_DOCUMENT] for numbers in rows]
    for row, lengths in enumerate(found):
        if any(n < 0 for n in lengths):
            raise ValueError(
                f"{key}: row {row} holds the length {min(lengths)}; lengths are 0 or more, and "
                f"{NO_DOCUMENT} fills up rows of fewer documents"
            )
    return found


def _steps(rows: Sequence[Sequence[int]], key: str) -> list[list[int]]:
    steps = []
    for row, offsets in enumerate(rows):
        known = [n for n in offsets if n >= 0]
        lengths = [after - before for before, after in pairwise(known)]
        if known[:1] != [0] or any(n < 0 for n in lengths):
            raise ValueError(f"{key}: row {row} does not count up from 0: {offsets}")
        steps.append(lengths)
    return steps


def _fit(
    lengths: Sequence[int], rooms: Sequence[int], row: int, name: str, seq_len: int
) -> list[Document]:
    """Return where documents lie that are followed by padding, those of no token left out."""
    if len(rooms) != len(lengths):
        raise ValueError(
            f"{name}: row {row} describes {len(lengths)} documents, and {name}_padded "
            f"{len(rooms)}; use as many numbers in both"
        )
    documents = _laid_out(lengths, rooms, row, name, seq_len)
    return [document for document in documents if document.length]


def _laid_out(
    lengths: Sequence[int], rooms: Sequence[int], row: int, name: str, seq_len: int
) -> list[Document]:
    documents, start = [], 0
    for place, length in enumerate(lengths):
        room = rooms[place] if place < len(rooms) else length
        if length > room:
            raise ValueError(
                f"{name}: document {place} of row {row} has {length} tokens, and {name}_padded "
                f"gives it {room}"
            )
        if start + length > seq_len:
            raise ValueError(
                f"{name}: the documents of row {row} overrun it: document {place} ends at token "
                f"{start + length} of {seq_len}"
            )
        documents.append(Document(start, length))
        start += room
    return documents


def _refuse_contradiction(first: str, other: str, described_by: Mapping[str, Rows]) -> None:
    """Refuse documents that a batch describes twice and differently.

    Document numbers may count the padding that follows a document with it, as AutoModel's do.
    """
    for row, (mine, its) in enumerate(zip(described_by[first], described_by[other], strict=True)):
        runs = {document.start: document.length for document in its}
        within = all(document.length <= runs.get(document.start, 0) for document in mine)
        if not (within if other in TOKEN_IDS else mine == its):
            raise ValueError(
                f"{first} and {other} describe different documents of row {row}; leave one of "
                "them out"
            )


def _runs(numbers: torch.Tensor) -> list[Document]:
    """Return the runs of equal positive numbers [S] of a row."""
    _, counts = torch.unique_consecutive(numbers, return_counts=True)
    starts = counts.cumsum(0) - counts
    found = zip(starts.tolist(), counts.tolist(), numbers[starts].tolist(), strict=True)
    return [Document(start, length) for start, length, number in found if number > 0]


def document_slots(
    documents: Rows, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return starts and lengths, int64 [B, D]; in unused slots 0 and -1000."""
    most = max(1, *(len(row) for row in documents))
    starts, lengths = (
        [[getattr(d, name) for d in row] + [unused] * (most - len(row)) for row in documents]
        for name, unused in (("start", 0), ("length", NO_DOCUMENT))
    )
    return torch.tensor(starts, device=device), torch.tensor(lengths, device=device)


def token_documents(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the number of each token's document in its row, int64 [B, S] from 1; 0 for padding.

    Args:
        batch: As for :func:`documents_of`, with ``input_ids`` [B, S].
    """
    ids = batch["input_ids"]
    rows, seq_len = ids.shape
    starts, lengths = document_slots(documents_of(batch, rows, seq_len), ids.device)
    starts = starts.where(lengths > 0, seq_len)  # unused slots come after all tokens
    slots, _, real = token_places(starts, lengths, seq_len)
    return (slots + 1).where(real, 0)


def tokens_ahead(
    ids: torch.Tensor, depth: int, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the token ``depth`` places ahead of each, 0 where the row or document ends before it.

    Args:
        ids: Int [B, S], whole rows.
        depth: 1 or more.
        documents: Any number per token [B, S] that differs between neighboring documents.
    """
    ahead = torch.zeros_like(ids)
    ahead[:, :-depth] = ids[:, depth:]
    if documents is not None:
        other = documents[:, depth:] != documents[:, :-depth]
        ahead[:, :-depth].masked_fill_(other, 0)
    return ahead
