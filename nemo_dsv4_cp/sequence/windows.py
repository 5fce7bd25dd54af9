# SPDX-License-Identifier: Apache-2.0
"""The compression windows that a rank pools, as rows of its features."""

# B batch rows   L local tokens   T tokens with features   n local windows   r compress ratio
# F feature width

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nemo_dsv4_cp.sequence.layout import SequenceLayout


def straddling(layout: SequenceLayout, ratio: int) -> int:
    """Return how many tokens of a rank's windows may lie before its shard.

    In packed rows r - 1: a window that ends with the shard's first token.
    """
    return ratio - 1 if layout.packed else 0


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows that a rank pools: complete ones whose last token it owns.

    Windows restart with each document, so in packed rows any may straddle a cut. There slot c of
    (L - 1) // r + 1 is for the window that contains the token c * r after the rank's first: windows
    do not overlap, so no two share a slot, and the number of slots depends on the shard length
    alone. A slot without a complete window holds the shard's last r tokens, as if they began a
    document; no query sees it.

    Attributes:
        ratio: r, tokens in a window.
        starts: Position in the row of each window's first token, int64 [B or 1, n].
        places: Position of the same token in its document, int64 [B or 1, n].
        is_first: Whether it is its document's first window, bool [B or 1, n, 1, 1].
        rows: For each token of each window, its index in the features [B, T, F] flattened to
            [B * T, F]; int64 [B * n * r]. T is L plus the :func:`straddling` tokens before the
            shard. None for rows that are not packed: there, the first token begins the first
            window, and windows follow one another without gaps.
        overlap_rows: The same for the window before each window, whose tokens are r earlier: the
            index in the overlap's features, in which T also counts r more tokens before the shard.
        count: n, windows in each row of the batch.
    """

    ratio: int
    starts: torch.Tensor
    places: torch.Tensor
    is_first: torch.Tensor
    rows: torch.Tensor | None = None
    overlap_rows: torch.Tensor | None = None
    count: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", self.places.shape[1])

    @classmethod
    def of(cls, layout: SequenceLayout, ratio: int, device: torch.device | None = None) -> Windows:
        """Return a layout's windows.

        Raises:
            ValueError: If rows are not packed and a window would straddle a cut.
        """
        if layout.packed:
            return cls._of_packed(layout, ratio, device)
        if layout.cp_size > 1 and layout.local_len % ratio:
            raise ValueError(
                f"a shard of {layout.local_len} tokens cannot work with compress ratio {ratio}: "
                f"its windows would straddle the cut; pad the row so that each of the "
                f"{layout.cp_size} CP ranks holds a multiple of {ratio} tokens "
                f"(context_parallel.pad_multiple)"
            )
        count = layout.end // ratio - layout.start // ratio
        starts = layout.start + torch.arange(count, device=device)[None] * ratio
        return cls(ratio, starts, starts, (starts == 0)[..., None, None])

    @classmethod
    def _of_packed(cls, layout: SequenceLayout, ratio: int, device: torch.device | None) -> Windows:
        inside = torch.arange(layout.start, layout.end, ratio, device=device)
        begin, end = layout.documents_at(inside)
        places = (inside - begin) // ratio * ratio
        starts = begin + places
        complete = starts + ratio <= end.clamp(max=layout.end)
        starts = torch.where(complete, starts, layout.end - ratio)
        places = torch.where(complete, places, 0)
        before = straddling(layout, ratio)
        rows = starts[..., None] - (layout.start - before) + torch.arange(ratio, device=device)
        of_batch = torch.arange(len(rows), device=device)[:, None, None]
        length = layout.local_len + before
        return cls(
            ratio,
            starts,
            places,
            (places == 0)[..., None, None],
            (rows + of_batch * length).flatten(),
            (rows + of_batch * (length + ratio)).flatten(),
        )
