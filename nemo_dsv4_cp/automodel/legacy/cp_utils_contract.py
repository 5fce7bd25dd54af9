# SPDX-License-Identifier: Apache-2.0
"""The contract of releases whose recipes cut batches with ``cp_utils`` (0.5), and ask no model.

Neither do they ask an attention whether it brings its own CP; both are patched for our models.
"""

from __future__ import annotations

from typing import Any

from nemo_dsv4_cp.automodel.contracts import Signature
from nemo_dsv4_cp.automodel.legacy import apply_cp, cp_utils_hook

NAME = "cp_utils.make_cp_batch_and_ctx"
SIGNATURES = (
    Signature(
        cp_utils_hook.MODULE,
        cp_utils_hook.FUNCTION,
        ("device_mesh", "batch", "loss_mask", "use_te", "padding_token_id", "num_chunks"),
        in_order=True,
    ),
    Signature(apply_cp.MODULE, apply_cp.FUNCTION, ("model", "cp_mesh"), in_order=True),
)


def install(model: Any) -> None:
    """Make recipes cut the batches of ``model`` as it asks; again changes nothing."""
    cp_utils_hook.install(model)
    apply_cp.install()
