# SPDX-License-Identifier: Apache-2.0
"""The kinds of layers in a model: what the costs of a layer depend on besides the model's sizes."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_dsv4_cp.kernels.operations import ALL_ENTRIES, CANDIDATES, INSIDE
from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO


@dataclass(frozen=True)
class Layer:
    """A kind of layer.

    Attributes:
        ratio: Compress ratio, 0 for the window alone.
        makes_entries: Whether it makes the entries that it attends to.
        selects: Among which entries its indexer selects, one of :data:`ALL_ENTRIES`,
            :data:`CANDIDATES` (all, and it chooses the candidates) and :data:`INSIDE`; empty
            without an indexer.
        shares: Whether it is V4.1's, whose layers share entries and what is selected.
        loss: ``context_parallel.indexer_loss.mode`` of V4's indexer, empty without a loss.
    """

    ratio: int
    makes_entries: bool
    selects: str = ""
    shares: bool = False
    loss: str = ""

    @classmethod
    def v4(cls, ratio: int, loss: str = "") -> Layer:
        """Return V4's layer of a compress ratio, whose indexer has the loss if it has one."""
        if ratio != OVERLAP_RATIO:
            return cls(ratio, bool(ratio))
        return cls(ratio, True, ALL_ENTRIES, loss=loss)

    @property
    def name(self) -> str:
        """The compress ratio, and in V4.1 what the layer does."""
        if not (self.shares and self.ratio):
            return str(self.ratio)
        of_indexer = {ALL_ENTRIES: "select", INSIDE: "inside"}
        does = "source" if self.makes_entries else of_indexer.get(self.selects, "reuse")
        return f"{self.ratio} {does}"

    @property
    def order(self) -> tuple[int, bool, bool]:
        """Sorts layers by ratio; of one ratio those come first that others depend on."""
        return self.ratio, not self.makes_entries, not self.selects

    @property
    def overlaps(self) -> bool:
        """Whether its windows also pool the window before."""
        return not self.shares and self.ratio == OVERLAP_RATIO

    @property
    def attends_to_selected(self) -> bool:
        """Whether it attends to the top-k entries only."""
        return self.overlaps or (self.shares and bool(self.ratio))

    @property
    def moves(self) -> bool:
        """Whether load balancing may move its queries, or their selection in V4.1."""
        if self.shares:
            return self.selects in (ALL_ENTRIES, CANDIDATES)
        return bool(self.ratio)
