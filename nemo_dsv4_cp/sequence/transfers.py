# SPDX-License-Identifier: Apache-2.0
"""Which rows of a per-token tensor go to which rank, and what an answer is made of.

The question is always the same: these tokens I want, in this order, and some of them I have. A halo
is such a question, and so are the rows of queries that a schedule gave to another rank.
"""

# R CP ranks

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from nemo_dsv4_cp.sequence.queries import Runs


@dataclass(frozen=True)
class Piece:
    """Neighbouring rows of an answer, all from one place.

    Attributes:
        rows: Rows of the tensor that they are rows of; for tokens that do not exist, how many.
        source: The rank that sends them, None where none does.
        exists: False for tokens before the row's first, which are zeros.
    """

    rows: slice
    source: int | None = None
    exists: bool = True

    def __len__(self) -> int:
        length: int = self.rows.stop - self.rows.start
        return length

    @property
    def is_own(self) -> bool:
        """Whether they are this rank's own."""
        return self.exists and self.source is None


@dataclass(frozen=True, eq=False)
class Transfers:
    """One rank's part in an exchange of rows.

    Attributes:
        wanted: The tokens of the answer, in its order.
        pieces: What the answer is made of, in its order. What a rank sends arrives in this order.
        sent: Per rank that wants any, rows of the tensor that is sent, in the order wanted there.
        any_moves: Whether any row of any rank moves: the same on all ranks.
    """

    wanted: Runs
    pieces: tuple[Piece, ...]
    sent: Mapping[int, tuple[slice, ...]]
    any_moves: bool

    @cached_property
    def leaving(self) -> Mapping[int, int]:
        """How many rows go to each rank that wants any."""
        return {
            rank: sum(part.stop - part.start for part in parts) for rank, parts in self.sent.items()
        }

    @cached_property
    def arriving(self) -> Mapping[int, int]:
        """How many rows come from each rank that sends any."""
        counts: Counter[int] = Counter()
        for piece in self.pieces:
            if piece.source is not None:
                counts[piece.source] += len(piece)
        return counts


def transfers(
    wanted: Sequence[Runs], own: Sequence[Runs], sent: Sequence[Runs], *, rank: int
) -> Transfers:
    """Answer every rank's question, and return one rank's part in it.

    Args:
        wanted: Of each rank, the tokens that it asks for.
        own: Of each rank, the tokens that it has rows of and need not be sent.
        sent: Of each rank, the tokens that it has rows of for others.
        rank: Whose part.
    """
    senders = _Rows(sent)
    pieces = tuple(_pieces(wanted[rank], _Rows([own[rank]]), senders))
    mine = _Rows([sent[rank]])
    asked_of_me = {
        reader: tuple(
            piece.rows
            for piece in _pieces(asked, _Rows([own[reader]]), mine)
            if piece.source is not None
        )
        for reader, runs in enumerate(wanted)
        if (asked := mine.among(runs))
    }
    # Of `any_moves` the first rank that lacks a row decides: most often the first or the second.
    return Transfers(
        wanted=wanted[rank],
        pieces=pieces,
        sent={reader: parts for reader, parts in asked_of_me.items() if parts},
        any_moves=any(
            piece.source is not None
            for runs, has in zip(wanted, own, strict=True)
            for piece in _pieces(runs, _Rows([has]), senders)
        ),
    )


class _Rows:
    """Where the rows of tokens are."""

    def __init__(self, runs_of_ranks: Sequence[Runs]) -> None:
        self._runs: list[tuple[int, int, int, int]] = []
        for rank, runs in enumerate(runs_of_ranks):
            row = 0
            for run in runs:
                self._runs.append((run.start, run.stop, rank, row))
                row += len(run)
        self._runs.sort()

    def find(self, token: int) -> tuple[int, int, int] | None:
        """Return rank and row of a token and the token after the last that follows it there."""
        place = self._begun_by(token) - 1
        if place < 0 or self._runs[place][1] <= token:
            return None
        start, stop, rank, row = self._runs[place]
        return rank, row + token - start, stop

    def next_after(self, token: int) -> int | None:
        """Return the first token beyond a missing one that has a row."""
        place = self._begun_by(token)
        return self._runs[place][0] if place < len(self._runs) else None

    def among(self, runs: Runs) -> Runs:
        """Return the tokens of ``runs`` that have a row, in their order."""
        return tuple(
            range(max(run.start, start), min(run.stop, stop))
            for run in runs
            for start, stop, _, _ in self._runs
            if start < run.stop and run.start < stop
        )

    def _begun_by(self, token: int) -> int:
        """Return how many runs begin at a token or before."""
        return bisect_right(self._runs, token, key=lambda run: run[0])


def _pieces(wanted: Runs, own: _Rows, senders: _Rows) -> Iterator[Piece]:
    for run in wanted:
        token = run.start
        while token < run.stop:
            end = run.stop
            if (found := own.find(token)) is not None:
                _, row, stop = found
                end = min(end, stop)
                yield Piece(slice(row, row + end - token))
                token = end
                continue
            if (mine := own.next_after(token)) is not None:
                end = min(end, mine)
            if (found := senders.find(token)) is not None:
                rank, row, stop = found
                end = min(end, stop)
                yield Piece(slice(row, row + end - token), source=rank)
            else:
                if (other := senders.next_after(token)) is not None:
                    end = min(end, other)
                yield Piece(slice(0, end - token), exists=False)
            token = end
