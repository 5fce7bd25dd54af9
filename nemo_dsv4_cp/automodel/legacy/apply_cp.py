# SPDX-License-Identifier: Apache-2.0
"""Experts beside CP, where AutoModel takes every attention for Transformer Engine's (0.5).

With ``ep_size`` > 1 its ``apply_cp`` sets a CP group on each ``attn_module``, which V4's attention
has none of. Later releases ask for ``setup_cp_attention`` first.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from nemo_dsv4_cp.automodel import patches

MODULE = "nemo_automodel.components.moe.parallelizer"
FUNCTION = "apply_cp"


def install() -> None:
    """Leave models that own their CP attention out of it; again changes nothing."""
    patches.wrap(importlib.import_module(MODULE), FUNCTION, _asking_first)


def _asking_first(original: Any) -> Any:
    @functools.wraps(original)
    def apply_cp(model: Any, cp_mesh: Any, *args: Any, **kwargs: Any) -> None:
        # Attention of ours gets its group with every batch.
        if not getattr(model, "_owns_cp_attention", False):
            original(model, cp_mesh, *args, **kwargs)

    return apply_cp
