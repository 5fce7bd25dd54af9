# SPDX-License-Identifier: Apache-2.0
"""How AutoModel's recipes scale the MoE's auxiliary loss under context parallelism.

Since 0.6 they set ``MoEAuxLossAutoScaler.main_loss_backward_scale`` each step, to cp_size over the
microbatches. 0.5 leaves it at 1, so that FSDP2's mean over the ranks divides the loss by cp_size.
"""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import version
from typing import Any


@functools.cache
def _is_scaled() -> bool:
    recipe: Any = importlib.import_module("nemo_automodel.recipes.base_recipe")
    return hasattr(recipe.BaseRecipe, "_set_moe_aux_loss_backward_scale")


def refuse_unscaled(setting: str, coefficient: float) -> None:
    """Refuse an auxiliary loss whose gradient would depend on cp_size, by its coefficient."""
    if coefficient > 0 and not _is_scaled():
        raise ValueError(
            f"{setting}={coefficient} under context parallelism: nemo_automodel "
            f"{version('nemo_automodel')} divides auxiliary losses by cp_size; install 0.6.0 or "
            f"later, or set {setting.split('.')[-1]}: 0"
        )
