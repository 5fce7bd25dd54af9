# SPDX-License-Identifier: Apache-2.0
"""Our batch function inside ``cp_utils.make_cp_batch_and_ctx``, where recipes call that (0.5).

AutoModel's function cuts every model's batch alike, for torch's ring attention, and receives no
model. Ours replaces it, finds out whose recipe calls, and passes all other models' batches to it.
"""

from __future__ import annotations

import functools
import importlib
import sys
import weakref
from types import FrameType
from typing import Any

from nemo_dsv4_cp.automodel import patches
from nemo_dsv4_cp.automodel.legacy.cp_utils import BATCH_FN_KEY, cut_with, submeshes

FUNCTION = "make_cp_batch_and_ctx"
MODULE = "nemo_automodel.components.distributed.cp_utils"
_models: weakref.WeakSet[Any] = weakref.WeakSet()


def adopt(model: Any) -> None:
    """Note a model that cuts its own batches, for as long as it lives."""
    _models.add(model)


def install() -> None:
    """Let our models cut their batches, whichever module imported AutoModel's function first."""
    patches.wrap(importlib.import_module(MODULE), FUNCTION, _standing_in_for, everywhere=True)


def _standing_in_for(original: Any) -> Any:
    @functools.wraps(original)
    def make_cp_batch_and_ctx(
        device_mesh: Any,
        batch: dict[str, Any],
        loss_mask: Any = None,
        use_te: bool = False,
        padding_token_id: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        cp_mesh, _ = submeshes(device_mesh)
        batch_fn = batch.pop(BATCH_FN_KEY, None)
        model = _trained_by(sys._getframe(1))
        if batch_fn is None and model is not None and cp_mesh is not None:
            if cp_mesh.size() > 1 and "labels" not in batch:
                raise NotImplementedError(
                    f"this recipe hands {FUNCTION} a batch without labels, and goes on with its "
                    "own labels of the whole row; under context parallelism, distillation needs "
                    "nemo_automodel 0.6.0 or later, or distributed.cp_size: 1"
                )
            batch_fn = model.prepare_model_inputs_for_cp(batch)["cp_sharder"].shard_batch
        if batch_fn is None:
            return original(
                device_mesh, batch, loss_mask, use_te, padding_token_id, *args, **kwargs
            )
        return cut_with(
            batch_fn, device_mesh, batch, loss_mask=loss_mask, padding_token_id=padding_token_id
        )

    return make_cp_batch_and_ctx


def _trained_by(caller: FrameType) -> Any | None:
    """Return our model if the recipe whose method calls trains it; else None.

    A caller that is no recipe is taken to train the model of ours that lives, if any does.
    """
    recipe = caller.f_locals.get("self")
    trained = getattr(recipe, "model_parts", None) or _models
    for model in trained:
        model = getattr(model, "module", model)  # DistributedDataParallel's
        if hasattr(model, "prepare_model_inputs_for_cp") and getattr(
            model, "_owns_cp_attention", False
        ):
            return model
    return None
