# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of a rank's compression windows are, as rows of its features."""

# B batch rows   L local tokens   n local windows   r compress ratio   F feature width

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_dsv4_cp.sequence.layout import SequenceLayout


@dataclass(frozen=True, eq=False)
class WindowRows:
    """The windows that a rank pools: complete ones whose last token it owns.

    Attributes:
        ratio: r, tokens in a window.
        places: Position of each window's first token in its document, int64 [B or 1, n].
        is_first: Whether it is its document's first window, bool [B or 1, n, 1, 1].
        rows: Which rows of the features the windows' tokens are, int64 [B or 1, n, r], features
            beginning as many tokens before the shard as windows may straddle. Of the overlap's
            features, which begin r tokens earlier, the same rows are the tokens r earlier. None
            where windows follow one another from the first row on.
    """

    ratio: int
    places: torch.Tensor
    is_first: torch.Tensor
    rows: torch.Tensor | None
    _shared: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, layout: SequenceLayout, ratio: int, device: torch.device) -> WindowRows:
        """Return a layout's windows.

        Raises:
            ValueError: If a window would straddle a cut.
        """
        windows = layout.windows(ratio, device)
        rows = None
        if windows.gapless_from is None:
            first = layout.start - layout.straddling(ratio)
            rows = windows.starts[..., None] - first + torch.arange(ratio, device=device)
        is_first = (windows.places == 0)[..., None, None]
        return cls(ratio, windows.places, is_first, rows)

    def __len__(self) -> int:
        return self.places.shape[1]

    def tokens(self, features_BTF: torch.Tensor) -> torch.Tensor:
        """Return the features of each window's tokens, [B, n, r, F]."""
        batch, length, width = features_BTF.shape
        if self.rows is None:
            whole = features_BTF[:, : len(self) * self.ratio]
            cut: torch.Tensor = whole.unflatten(1, (len(self), self.ratio))
            return cut
        index = self._flat_rows(batch, length)
        picked = features_BTF.flatten(0, 1).index_select(0, index)
        return picked.view(batch, len(self), self.ratio, width)

    def _flat_rows(self, batch: int, length: int) -> torch.Tensor:
        """Return ``rows`` of each row of the batch, as rows of all of them end to end."""
        if (batch, length) not in self._shared:
            assert self.rows is not None
            of_batch = torch.arange(batch, device=self.rows.device)[:, None, None] * length
            self._shared[batch, length] = (self.rows + of_batch).flatten()
        index: torch.Tensor = self._shared[batch, length]
        return index

    def rope(self, rotary: Any, like_BLE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of the windows' places, [B, n, rope dims] each; computed once.

        Args:
            rotary: AutoModel's rotary embedding of compressed entries, one for all layers.
            like_BLE: Activations; only their rows, dtype and device are read.
        """
        batch = like_BLE.shape[0]
        key = (id(rotary), batch, like_BLE.dtype)
        if key not in self._shared:
            self._shared[key] = rotary(like_BLE, self.places.expand(batch, -1))
        rope: tuple[torch.Tensor, torch.Tensor] = self._shared[key]
        return rope
