# SPDX-License-Identifier: Apache-2.0
"""Packed rows: which documents they hold, and the same documents without the padding between them.

# B batch rows   S tokens a row   D documents of the fullest row
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch

NO_DOCUMENT = -1000
"""Fills up rows of fewer documents, as in AutoModel's packed collater."""

TOKEN_IDS = ("packed_seq_ids", "_packed_seq_ids")
"""Keys of a document's number for each token."""


@dataclass(frozen=True)
class Document:
    """The real tokens of one document of a row: ``length`` tokens from ``start`` on."""

    start: int
    length: int


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Return whether the rows hold several documents, by any of AutoModel's markers."""
    markers = ("seq_lens", "seq_lens_padded", "cu_seqlens", "cu_seqlens_padded", *TOKEN_IDS)
    return batch.get("qkv_format") == "thd" or any(batch.get(key) is not None for key in markers)


def documents_of(batch: Mapping[str, Any], rows: int, seq_len: int) -> list[list[Document]]:
    """Read the documents of each row.

    Args:
        batch: Holds ``seq_lens`` [B, D] or [D], with ``seq_lens_padded`` where documents are
            followed by padding; or ``cu_seqlens`` [B, D + 1] or [D + 1], with ``cu_seqlens_padded``
            likewise; or ``_packed_seq_ids`` [B, S], a number a token and 0 for padding. Negative
            fillers end a row's lengths.
        rows: B.
        seq_len: S.

    Raises:
        KeyError: If nothing tells the documents.
        ValueError: If the numbers are not whole, a length is negative, documents do not fit their
            row, or two of these tell different ones.
    """
    told: dict[str, list[list[Document]]] = {}
    for name, read in (("seq_lens", _lengths), ("cu_seqlens", _steps)):
        real = read(batch, name, rows)
        if real is None:
            continue
        padded = read(batch, f"{name}_padded", rows) or real
        told[name] = [
            _fit(lengths, rooms, row, name, seq_len)
            for row, (lengths, rooms) in enumerate(zip(real, padded, strict=True))
        ]
    for name in TOKEN_IDS:
        if batch.get(name) is not None:
            told[name] = [_runs(row) for row in _of_tokens(batch[name], name, rows, seq_len)]
    if not told:
        raise KeyError(
            "a packed batch (qkv_format: thd) requires `seq_lens`, `cu_seqlens` or "
            "`_packed_seq_ids`: nothing else tells where its documents end"
        )
    first, *others = told
    for other in others:
        _refuse_contradiction(first, other, told)
    return told[first]


def described(value: Any) -> str:
    """Say what a value is, for an error: of a tensor all but its numbers."""
    if not isinstance(value, torch.Tensor):
        return f"of type {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    layout = "" if value.layout is torch.strided else f" ({named(value.layout)})"
    return f"{named(value.dtype)} {list(value.shape)} on {value.device}{layout}"


def named(thing: torch.dtype | torch.layout) -> str:
    """Return the name of a dtype or layout without its module."""
    return str(thing).removeprefix("torch.")


def documents_as_told(batch: Mapping[str, Any], rows: int, seq_len: int) -> list[list[Document]]:
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


def _is_whole(value: Any) -> bool:
    """Whether a value holds integers that are there to read."""
    return (
        isinstance(value, torch.Tensor)
        and not (value.is_nested or value.is_floating_point() or value.is_complex())
        and value.dtype != torch.bool
        and value.layout is torch.strided
        and value.device.type != "meta"
    )


def _lengths(batch: Mapping[str, Any], key: str, rows: int) -> list[list[int]] | None:
    if batch.get(key) is None:
        return None
    found = []
    for row, numbers in enumerate(_of_rows(batch[key], key, rows)):
        lengths = [n for n in numbers if n != NO_DOCUMENT]
        if any(n < 0 for n in lengths):
            raise ValueError(
                f"{key}: row {row} holds the length {min(lengths)}; lengths are 0 or more, and "
                f"{NO_DOCUMENT} fills up rows of fewer documents"
            )
        found.append(lengths)
    return found


def _steps(batch: Mapping[str, Any], key: str, rows: int) -> list[list[int]] | None:
    if batch.get(key) is None:
        return None
    steps = []
    for row, offsets in enumerate(_of_rows(batch[key], key, rows)):
        known = [n for n in offsets if n >= 0]
        lengths = [after - before for before, after in pairwise(known)]
        if known[:1] != [0] or any(n < 0 for n in lengths):
            raise ValueError(f"{key}: row {row} does not count up from 0: {offsets}")
        steps.append(lengths)
    return steps


def _of_rows(value: Any, key: str, rows: int) -> list[list[int]]:
    """Return the numbers of each row of the batch."""
    if not (_is_whole(value) and value.dim() in (1, 2)):
        raise ValueError(
            f"{key} is {described(value)}; use int64 [{rows}, D], D whole numbers for each row"
        )
    numbers: list[list[int]] = torch.atleast_2d(value).tolist()
    if len(numbers) != rows:
        raise ValueError(f"{key} describes {len(numbers)} rows, and the batch has {rows}")
    return numbers


def _of_tokens(value: Any, key: str, rows: int, seq_len: int) -> list[list[int]]:
    """Return the number of each token of each row."""
    if not (_is_whole(value) and list(value.shape) == [rows, seq_len]):
        raise ValueError(
            f"{key} is {described(value)}; use int64 [{rows}, {seq_len}], a whole number a token"
        )
    numbers: list[list[int]] = value.tolist()
    return numbers


def _fit(
    lengths: Sequence[int], rooms: Sequence[int], row: int, name: str, seq_len: int
) -> list[Document]:
    """Return where documents lie that are followed by padding, those of no token left out."""
    if len(rooms) != len(lengths):
        raise ValueError(
            f"{name}: row {row} tells {len(lengths)} documents, and {name}_padded {len(rooms)}; "
            "use as many numbers in both"
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


def _refuse_contradiction(
    first: str, other: str, told: Mapping[str, Sequence[Sequence[Document]]]
) -> None:
    """Refuse documents that a batch tells twice and differently.

    A number a token may count the padding that follows a document with it, as AutoModel's do.
    """
    for row, (mine, its) in enumerate(zip(told[first], told[other], strict=True)):
        runs = {document.start: document.length for document in its}
        within = all(document.length <= runs.get(document.start, 0) for document in mine)
        if not (within if other in TOKEN_IDS else mine == its):
            raise ValueError(
                f"{first} and {other} tell different documents of row {row}; leave one of them out"
            )


def _runs(ids: Sequence[int]) -> list[Document]:
    documents: list[Document] = []
    for place, number in enumerate(ids):
        if number <= 0:
            continue
        if place and ids[place - 1] == number:
            documents[-1] = Document(documents[-1].start, documents[-1].length + 1)
        else:
            documents.append(Document(place, 1))
    return documents


def check_tokens(
    documents: Sequence[Sequence[Document]],
    position_ids: torch.Tensor | None,
    labels: torch.Tensor,
) -> None:
    """Refuse rows that say something else about their documents elsewhere.

    Args:
        documents: From :func:`documents_of`.
        position_ids: Int [B, S] or None; must count from 0 in each document.
        labels: Int [B, S]; tokens of no document must be -100, since they are left out.

    Raises:
        ValueError: If a row's positions or labels disagree with its documents.
    """
    counting = torch.zeros(labels.shape[:2], dtype=torch.long)
    real = torch.zeros(labels.shape[:2], dtype=torch.bool)
    for row, of_row in enumerate(documents):
        for document in of_row:
            span = slice(document.start, document.start + document.length)
            counting[row, span] = torch.arange(document.length)
            real[row, span] = True
    real = real.to(labels.device)
    if position_ids is not None and position_ids.dim() == 2:
        astray = (position_ids.cpu().expand(counting.shape) != counting) & real.cpu()
        if bool(astray.any()):
            row, token = astray.nonzero()[0].tolist()
            raise ValueError(
                f"position_ids disagree with the documents of row {row}: token {token} is at "
                f"position {int(counting[row, token])} of its document, and position_ids say "
                f"{int(position_ids.expand(counting.shape)[row, token])}; leave position_ids out "
                "of the batch or mend the packer's lengths"
            )
    lost = (labels != -100) & ~real
    if bool(lost.any()):
        row, token = lost.nonzero()[0].tolist()
        raise ValueError(
            f"labels: token {token} of row {row} has a label and belongs to no document; mend the "
            "packer's lengths, or set the label to -100"
        )


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

    def to(self, device: torch.device) -> Repacked:
        """Return the same on a device."""
        return Repacked(*(getattr(self, field.name).to(device) for field in fields(self)))

    def move(self, tensor: torch.Tensor, seq_dim: int, fill: float) -> torch.Tensor:
        """Return a per-token tensor [B, S, ..] in its new places, ``fill`` in the padding.

        Raises:
            ValueError: If the tensor has not the batch's rows and tokens.
        """
        return place_tokens(tensor, self.source, tuple(self.target.shape), seq_dim, fill)


def place_tokens(
    tensor: torch.Tensor,
    source: torch.Tensor,
    rows: Sequence[int],
    seq_dim: int,
    fill: float,
) -> torch.Tensor:
    """Return ``tensor[b, source[b, s]]``, ``fill`` where the source is -1; differentiable.

    Args:
        tensor: [B, S, ..] of shape ``rows`` in its first dimension and ``seq_dim``.
        source: Int64 [B, S'].
        rows: [B, S], what the tensor must have.
        seq_dim: Where S is.
        fill: Value of slots without a source.

    Raises:
        ValueError: If the tensor has other rows or tokens.
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


def repack(
    documents: Sequence[Sequence[Document]],
    *,
    seq_len: int,
    document_multiple: int,
    padded_len: int,
) -> Repacked:
    """Lay the documents end to end.

    Args:
        documents: From :func:`documents_of`.
        seq_len: S, tokens of the old rows.
        document_multiple: Each document is padded to a multiple of this; 1 for no padding.
        padded_len: S', tokens of the new rows; at least :func:`packed_len`.
    """
    rows = len(documents)
    source = torch.full((rows, padded_len), -1)
    target = torch.full((rows, seq_len), -1)
    position_ids = torch.zeros(rows, padded_len, dtype=torch.long)
    seq_ids = torch.zeros(rows, padded_len, dtype=torch.long)
    most = max(1, *(len(row) for row in documents))
    seq_lens = torch.full((rows, most), NO_DOCUMENT)
    seq_lens_padded = torch.full((rows, most), NO_DOCUMENT)
    for row, of_row in enumerate(documents):
        begin = 0
        for place, document in enumerate(of_row):
            room = _round_up(document.length, document_multiple)
            old = torch.arange(document.start, document.start + document.length)
            source[row, begin : begin + document.length] = old
            target[row, old] = torch.arange(begin, begin + document.length)
            position_ids[row, begin : begin + room] = torch.arange(room)
            seq_ids[row, begin : begin + room] = place + 1
            seq_lens[row, place], seq_lens_padded[row, place] = document.length, room
            begin += room
    return Repacked(source, target, position_ids, seq_ids, seq_lens, seq_lens_padded)


def packed_len(documents: Sequence[Sequence[Document]], document_multiple: int) -> int:
    """Return the tokens of the fullest row once its documents lie end to end."""
    return max(sum(_round_up(d.length, document_multiple) for d in row) for row in documents)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def token_documents(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the number of each token's document in its row, from 1; 0 for padding.

    Args:
        batch: As for :func:`documents_of`, with ``input_ids`` [B, S].

    Returns:
        Int64 [B, S].
    """
    ids = batch["input_ids"]
    return token_numbers(documents_of(batch, *ids.shape), ids.shape[1]).to(ids.device)


def token_numbers(documents: Sequence[Sequence[Document]], seq_len: int) -> torch.Tensor:
    """Return the number of each token's document as :func:`token_documents` does, on the CPU."""
    numbers = torch.zeros(len(documents), seq_len, dtype=torch.long)
    for row, of_row in enumerate(documents):
        for place, document in enumerate(of_row):
            numbers[row, document.start : document.start + document.length] = place + 1
    return numbers


def tokens_ahead(
    ids: torch.Tensor, depth: int, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the token ``depth`` places ahead of each, 0 where the row or document ends before it.

    Args:
        ids: Int [B, S], whole rows.
        depth: 1 or more.
        documents: Any number a token [B, S] that differs between neighbouring documents.
    """
    ahead = torch.zeros_like(ids)
    ahead[:, :-depth] = ids[:, depth:]
    if documents is not None:
        other = documents[:, depth:] != documents[:, :-depth]
        ahead[:, :-depth].masked_fill_(other, 0)
    return ahead
