# SPDX-License-Identifier: Apache-2.0
"""What registered operations launch and touch inside, for profiles with fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """One call of an operation.

    Attributes:
        launches: Kernels launched.
        read_bytes: What they read of device memory.
        written_bytes: What they write.
        scratch_bytes: The most that is allocated inside at a time, outputs left out.
    """

    launches: int
    read_bytes: int
    written_bytes: int
    scratch_bytes: int


_COSTS: dict[str, Callable[..., Cost]] = {}


def register_cost(name: str) -> Callable[[Callable[..., Cost]], Callable[..., Cost]]:
    """Register a function of the arguments of operation ``name`` (``"dsv4_cp::attend"``)."""

    def register(cost: Callable[..., Cost]) -> Callable[..., Cost]:
        _COSTS[name] = cost
        return cost

    return register


def cost_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Cost | None:
    """Return what a call of the ``OpOverload`` costs, None where no cost is registered."""
    cost = _COSTS.get(func._schema.name)
    return None if cost is None else cost(*args, **(kwargs or {}))
