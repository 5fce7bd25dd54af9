# SPDX-License-Identifier: Apache-2.0
"""``check_finite``: which layer, rank and tensor a NaN or an infinity came from.

Every module's output is checked as it is computed, and reported once per forward, by all ranks of
the CP group together: what one rank computed wrong reaches the others through their entries, later.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from nemo_dsv4_cp.automodel.torch_api import NO_BACKWARD, backward_id
from nemo_dsv4_cp.exchange.collectives import Group, all_gather_metadata


class FiniteCheck:
    """Watches the outputs of a model's modules."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Hook every module that is there; those of later wrappers are not seen."""
        self._outputs: list[tuple[str, torch.Tensor]] = []
        for name, module in model.named_modules():
            # Not a closure: a copy of the model, as a pipeline stage is, must hold a copy of it.
            module.register_forward_hook(partial(self._watch, name or "the model"))

    def _watch(self, name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        if backward_id() != NO_BACKWARD:
            return  # a recomputation shows nothing new
        for tensor in _floats(output):
            self._outputs.append((name, tensor.detach().isfinite().all()))

    def raise_on_all_ranks(self, cp_group: Group | None) -> None:
        """Raise on every rank of the group if one saw what is not finite since the last call.

        Raises:
            FloatingPointError: Names the first module, in the order of the forward, and the rank.
        """
        outputs, self._outputs = self._outputs, []
        if not outputs:
            return
        finite = torch.stack([flag for _, flag in outputs])
        none = len(outputs)
        places = torch.arange(none, device=finite.device).masked_fill(finite, none)
        first = all_gather_metadata(places.min()[None], dim=0, cp_group=cp_group).tolist()
        if min(first) < none:
            rank = first.index(min(first))
            raise FloatingPointError(
                f"context_parallel.check_finite: the output of {outputs[min(first)][0]} on CP rank "
                f"{rank} of {len(first)} is the first tensor of this forward that holds a NaN or "
                "an infinity; look at that module's input and weights there"
            )


def _floats(output: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors that a module returned."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, tuple | list):
        for each in output:
            yield from _floats(each)
