# SPDX-License-Identifier: Apache-2.0
"""How far results may be from one GPU's in float32, and how far one is."""

from __future__ import annotations

import math
from dataclasses import dataclass

OUTPUT_LIMIT = 1e-5
"""Largest difference of outputs and of the loss."""

GRADIENT_LIMIT = 5e-5
"""Largest difference of a parameter's gradient, relative to its largest entry."""


@dataclass(frozen=True)
class Difference:
    """How far a tensor under CP is from the same on one rank.

    Attributes:
        name: What is compared, such as ``"loss"`` or ``"gradient of lm_head.weight"``.
        value: The largest difference; of gradients relative to the largest entry, of expert loads
            relative to all.
        limit: What rounding may explain.
    """

    name: str
    value: float
    limit: float

    @property
    def passes(self) -> bool:
        """Return whether the difference is within its limit (NaN is not)."""
        return self.value <= self.limit

    @property
    def share(self) -> float:
        """Return the difference over its limit, infinite for NaN."""
        if self.limit == 0 or self.value != self.value:
            return 0.0 if self.value == 0 else math.inf
        return self.value / self.limit
