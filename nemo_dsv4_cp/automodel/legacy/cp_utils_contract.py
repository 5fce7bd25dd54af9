# SPDX-License-Identifier: Apache-2.0
"""The contract of releases whose recipes cut every model's batches with ``cp_utils`` (0.5).

They have no sharder of a model's own, and no CP of an attention's own; both are patched in.
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


def install() -> None:
    """Patch both functions; calling it again changes nothing."""
    cp_utils_hook.install()
    apply_cp.install()


def adopt(model: Any) -> None:
    """Note a model, so that loops that are no recipe of AutoModel cut batches with its sharder."""
    cp_utils_hook.adopt(model)
