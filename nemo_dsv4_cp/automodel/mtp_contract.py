# SPDX-License-Identifier: Apache-2.0
"""Multi-token prediction under CP: AutoModel's recipe asks the model for its inputs (since 0.7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_automodel.components.models.common import mtp

from nemo_dsv4_cp.automodel.contracts import Signature

if TYPE_CHECKING:
    from nemo_automodel.components.models.common.mtp import MTPContextParallelInputs

_PREPARE = "prepare_mtp_context_parallel_inputs"
ASKS_MODELS = hasattr(mtp, _PREPARE)
"""Whether AutoModel's recipes ask."""

SIGNATURES = (
    (Signature(mtp.__name__, _PREPARE, ("batch", "num_depths", "ignore_index")),)
    if ASKS_MODELS
    else ()
)


def shifted_inputs(
    batch: dict[str, Any], *, num_depths: int, ignore_index: int
) -> MTPContextParallelInputs:
    """Return what AutoModel makes of a full batch for each depth.

    Raises:
        NotImplementedError: If AutoModel has no such contract.
    """
    if not ASKS_MODELS:
        raise NotImplementedError(
            "this nemo_automodel prepares nothing for multi-token prediction under context "
            "parallelism; install 0.7.0 or later, or set num_nextn_predict_layers: 0"
        )
    return getattr(mtp, _PREPARE)(batch, num_depths=num_depths, ignore_index=ignore_index)
