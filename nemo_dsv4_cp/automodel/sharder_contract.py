# SPDX-License-Identifier: Apache-2.0
"""The contract of releases with ``ContextParallelSharder`` (since 0.6): recipes call the model.

Only what that contract leaves out is patched: token verbs for packed rows that were laid out again,
and the distillation recipe.
"""

from __future__ import annotations

from typing import Any

from nemo_dsv4_cp.automodel import distillation, mtp, token_verbs
from nemo_dsv4_cp.automodel.contracts import signatures_of
from nemo_dsv4_cp.automodel.sharding import PLACE

NAME = "ContextParallelSharder"
_SHARDER = {
    "ContextParallelSharder.__init__": "shard_batch local_token_global_indices loss_mask "
    "padding_token_id",
    "ContextParallelSharder.shard_token_tensor": "self tensor seq_dim fill /",
    "ContextParallelSharder.gather_token_tensor": "self tensor seq_dim trim fill /",
}
SIGNATURES = (*signatures_of({f"{PLACE}.sharder": _SHARDER}), *mtp.SIGNATURES)


def install() -> None:
    """Patch what the contract leaves out; calling it again changes nothing.

    Raises:
        UnsupportedAutoModel: If the distillation recipe runs and is not as we know it.
    """
    token_verbs.install()
    distillation.install()


def adopt(model: Any) -> None:
    """Need nothing of a model: recipes of these releases call it by themselves."""
