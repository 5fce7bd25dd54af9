# SPDX-License-Identifier: Apache-2.0
"""Where every token and every compressed window lives: positions only, no communication.

Rank k of R owns the contiguous tokens [k * L, (k + 1) * L) of every row, and the compressed entries
of the windows that end there. Every other file asks here instead of computing a position itself.
"""

# S global tokens   L local tokens (S / R)   R CP ranks   P compressed entries (S / ratio)

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

OVERLAP_RATIO = 4
"""The compress ratio whose windows also pool the window before (CSA).

AutoModel's ``_pool_windows``.
"""


def local_seq_multiple(compress_ratios: Iterable[int] | None) -> int:
    """Return the number that a shard length must be a multiple of.

    A window may not straddle a cut, so each shard holds whole windows of every ratio; overlapping
    windows count twice (AutoModel's ``dsv4_cp_local_seq_multiple``).

    Args:
        compress_ratios: One ratio a layer; entries of 0 or less ask for nothing.

    Returns:
        The LCM over the layers, 1 when no layer compresses.
    """
    ratios = [int(ratio) for ratio in compress_ratios or ()]
    needs = [2 * r if r == OVERLAP_RATIO else r for r in ratios if r > 0]
    return math.lcm(*needs)


def padded_seq_len(seq_len: int, *, cp_size: int, pad_multiple: int) -> int:
    """Return the smallest length >= ``seq_len`` whose ``cp_size`` shards are all multiples.

    Args:
        seq_len: Tokens in a row before padding.
        cp_size: Number of CP ranks.
        pad_multiple: What each shard length must be a multiple of; less than 2 counts as 2, as in
            AutoModel's ``shard_batch_contiguous``.
    """
    divisor = cp_size * max(pad_multiple, 2)
    return -(-seq_len // divisor) * divisor


def validate_cp_size(cp_size: int, *, pad_multiple: int, max_seq_len: int) -> None:
    """Refuse more ranks than the longest row has shards for.

    Args:
        cp_size: Number of CP ranks.
        pad_multiple: What each shard length is a multiple of.
        max_seq_len: Longest row that the model knows positions for.

    Raises:
        ValueError: If even a row of ``max_seq_len`` tokens leaves a rank nothing but padding.
    """
    useful = max(max_seq_len // max(pad_multiple, 2), 1)
    if cp_size > useful:
        raise ValueError(
            f"distributed.cp_size={cp_size} cannot work: shards hold a multiple of {pad_multiple} "
            f"tokens (context_parallel.pad_multiple), so max_position_embeddings={max_seq_len} "
            f"tokens fill {useful} of them and the other ranks would hold padding only; use "
            f"{useful} or fewer"
        )


@dataclass(frozen=True)
class SequenceLayout:
    """One rank's view of rows of one document each: its tokens and what its queries may see.

    Attributes:
        local_len: L, tokens on each rank.
        cp_rank: This rank's index.
        cp_size: R, number of CP ranks.
    """

    local_len: int
    cp_rank: int = 0
    cp_size: int = 1

    @classmethod
    def of_padded(cls, seq_len: int, *, cp_rank: int, cp_size: int) -> SequenceLayout:
        """Cut a padded row of ``seq_len`` tokens into ``cp_size`` equal shards.

        Raises:
            ValueError: If the shards would not be equal.
        """
        if seq_len % cp_size:
            raise ValueError(
                f"a row of {seq_len} tokens cannot be cut into distributed.cp_size={cp_size} equal "
                f"shards; pad it to {padded_seq_len(seq_len, cp_size=cp_size, pad_multiple=1)}"
            )
        return cls(local_len=seq_len // cp_size, cp_rank=cp_rank, cp_size=cp_size)

    @property
    def start(self) -> int:
        """Global position of this rank's first token."""
        return self.cp_rank * self.local_len

    @property
    def end(self) -> int:
        """Global position after this rank's last token."""
        return self.start + self.local_len

    @property
    def seq_len(self) -> int:
        """S, tokens in the whole row."""
        return self.local_len * self.cp_size

    @property
    def own(self) -> range:
        """Positions of this rank's tokens."""
        return range(self.start, self.end)

    def positions(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the global position of each local token, int64 [L]."""
        return torch.arange(self.start, self.end, device=device)

    def document_positions(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the position of each local token in its document, int64 [B or 1, L]."""
        return self.positions(device)[None]

    @property
    def shard_starts(self) -> range:
        """Positions of the ranks' first tokens."""
        return range(0, self.seq_len, self.local_len)

    def shard(self, rank: int, *, before: int = 0) -> range:
        """Return the positions of ``rank``'s tokens, and of as many before them.

        Before the row's first token they are negative.
        """
        return range(rank * self.local_len - before, (rank + 1) * self.local_len)

    def windows(self, ratio: int, device: torch.device | None = None) -> Windows:
        """Return the complete windows that this rank pools: those whose last token it owns.

        Raises:
            ValueError: If a window would straddle a cut.
        """
        if self.cp_size > 1 and self.local_len % ratio:
            raise ValueError(
                f"a shard of {self.local_len} tokens cannot work with compress ratio {ratio}: its "
                f"windows would straddle the cut; pad the row so that each of the {self.cp_size} "
                f"CP ranks holds a multiple of {ratio} tokens (context_parallel.pad_multiple)"
            )
        count = self.end // ratio - self.start // ratio
        starts = self.start + torch.arange(count, device=device)[None] * ratio
        return Windows(ratio, starts, places=starts, gapless_from=self.start)

    def straddling(self, ratio: int) -> int:
        """Return how many tokens of this rank's windows may lie before its shard."""
        return 0

    def first_keys(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Return the first position that a query at each of ``positions`` [C] may see, [B, C].

        None where documents end no query's view: one document a row.
        """
        return None

    def entry_order(self, ratio: int, capacity: int, device: torch.device) -> torch.Tensor | None:
        """Return where queries find each entry among those of all ranks, in rank order.

        Args:
            ratio: Compress ratio.
            capacity: Entries that each rank has.
            device: Where the result lives.

        Returns:
            Int64 [B, P]; None where they are in order already.
        """
        return None

    def entry_span(self, span: range, ratio: int) -> range:
        """Return which entries the queries at the positions in ``span`` see between them."""
        return range(span.stop // ratio)

    def most_entries(self, rows: int, ratio: int) -> int:
        """Return how many entries ``rows`` neighbouring queries may see between them at most."""
        return self.seq_len // ratio

    def visible_entries(
        self, positions: torch.Tensor, ratio: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first entry that each query sees and the one after its last.

        Entry w covers tokens [w * ratio, (w + 1) * ratio) of its document and is seen once
        complete: w < (i + 1) // ratio for the query at document position i (DeepSeek-V4 report;
        AutoModel's ``DeepseekV4Attention.forward``).

        Args:
            positions: Of the queries, int64 [C].
            ratio: Compress ratio.

        Returns:
            Int64 [B, C] each; B is 1 where all rows of the batch are alike.
        """
        stop = (positions + 1) // ratio
        return torch.zeros_like(stop)[None], stop[None]

    @property
    def rows(self) -> int:
        """How many rows of the batch it tells apart; 1 where all are alike."""
        return 1

    def entries_before(self, cuts: Sequence[int], ratio: int) -> list[int]:
        """Return how many entries the queries before each of the ascending ``cuts`` see.

        Query by query, in all ``rows``.
        """
        return entries_before(cuts, ratio)

    def entries_seen(self, span: range, ratio: int) -> int:
        """Return how many entries the queries at ``span`` see, query by query, in all ``rows``."""
        before, after = self.entries_before((span.start, span.stop), ratio)
        return after - before


def entries_seen(span: range, ratio: int) -> int:
    """Return the sum of (i + 1) // ratio over the document positions i in ``span``."""
    before, after = entries_before((span.start, span.stop), ratio)
    return after - before


def entries_before(ends: Iterable[int], ratio: int, begin: int = 0) -> list[int]:
    """Return the sum of (i + 1) // ratio over the positions i of a document before each end.

    With f = end // ratio, each w < f is seen by end - (w + 1) * ratio + 1 queries.

    Args:
        ends: Positions in the row.
        ratio: Compress ratio.
        begin: Where the document begins.
    """

    def before(end: int) -> int:
        full = end // ratio
        return full * (2 * end + 2 - ratio * (full + 1)) // 2

    return [before(end - begin) for end in ends]


F = TypeVar("F", bound=Callable[..., Any])


def once_a_layout(function: F) -> F:
    """Compute a function of a layout, and of others, once for all layers of a step.

    The last few layouts are remembered. Not within them: FSDP2 walks through what a block is called
    with. A compiler, which would trace and warn about the memory, computes anew.
    """
    remembered = functools.lru_cache(maxsize=32)(function)

    @functools.wraps(function)
    def once(layout: SequenceLayout, *others: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(layout, *others)
        return remembered(layout, *others)

    return cast(F, once)


@dataclass(frozen=True)
class Windows:
    """The windows that a rank pools into entries.

    Attributes:
        ratio: Tokens in a window.
        starts: Position in the row of each window's first token, int64 [B, n]; B is 1 where all
            rows of the batch are alike.
        places: Position of the same token in its document.
        gapless_from: Position that each row's windows follow one another from, without a gap;
            None where they may leave gaps.
    """

    ratio: int
    starts: torch.Tensor
    places: torch.Tensor
    gapless_from: int | None

    def __len__(self) -> int:
        return self.starts.shape[1]
