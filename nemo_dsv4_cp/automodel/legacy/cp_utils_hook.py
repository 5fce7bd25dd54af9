# SPDX-License-Identifier: Apache-2.0
"""The contract of releases whose recipes shard every model's batches with ``cp_utils`` (0.5).

In these releases, a model cannot shard its own batches and attention cannot bring its own CP. Two
patches add both:

- AutoModel's ``make_cp_batch_and_ctx`` receives no model and shards every batch in the same way,
  for torch's ring attention. Our replacement finds the recipe that calls it. If that recipe trains
  one of our models, the model's sharder shards the batch; otherwise AutoModel's function does.
- At ``ep_size`` > 1, AutoModel's ``apply_cp`` sets a CP group on the ``attn_module`` of each
  attention. V4's attention has no ``attn_module``. (Later releases look for ``setup_cp_attention``
  first.) Our replacement skips models that own their CP attention: they receive the group with
  every batch.
"""

from __future__ import annotations

import importlib
import sys
import weakref
from types import FrameType
from typing import Any

from nemo_dsv4_cp.automodel import patches
from nemo_dsv4_cp.automodel.contracts import signatures_of
from nemo_dsv4_cp.automodel.legacy.cp_utils import BATCH_FN_KEY, cut_with, submeshes

NAME = "cp_utils.make_cp_batch_and_ctx"
FUNCTION = "make_cp_batch_and_ctx"
MODULE = "nemo_automodel.components.distributed.cp_utils"
_PARALLELIZER = "nemo_automodel.components.moe.parallelizer"
SIGNATURES = signatures_of(
    {
        MODULE: {FUNCTION: "device_mesh batch loss_mask use_te padding_token_id num_chunks /"},
        _PARALLELIZER: {"apply_cp": "model cp_mesh /"},
    }
)
_models: weakref.WeakSet[Any] = weakref.WeakSet()


def adopt(model: Any) -> None:
    """Note a model that shards its own batches, for as long as it lives."""
    _models.add(model)


def install() -> None:
    """Patch both functions, whichever module imported the first; again changes nothing."""
    patches.wrap(importlib.import_module(MODULE), FUNCTION, _replacing, everywhere=True)
    leave_out_own_cp_attention()


def leave_out_own_cp_attention() -> None:
    """Have ``apply_cp`` leave models that own their CP attention as they are."""
    patches.wrap(importlib.import_module(_PARALLELIZER), "apply_cp", _looking_first)


def _looking_first(original: Any, model: Any, cp_mesh: Any, *args: Any, **kwargs: Any) -> None:
    if not getattr(model, "_owns_cp_attention", False):
        original(model, cp_mesh, *args, **kwargs)


def _replacing(
    original: Any,
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
    model = _trained_by(sys._getframe(2))  # whoever called the wrapper
    if batch_fn is None and model is not None and cp_mesh is not None:
        if cp_mesh.size() > 1 and "labels" not in batch:
            raise NotImplementedError(
                f"this recipe hands {FUNCTION} a batch without labels, and goes on with its own "
                "labels of the whole row; under context parallelism, distillation needs "
                "nemo_automodel 0.6.0 or later, or distributed.cp_size: 1"
            )
        batch_fn = model.prepare_model_inputs_for_cp(batch)["cp_sharder"].shard_batch
    if batch_fn is None:
        return original(device_mesh, batch, loss_mask, use_te, padding_token_id, *args, **kwargs)
    return cut_with(
        batch_fn, device_mesh, batch, loss_mask=loss_mask, padding_token_id=padding_token_id
    )


def _trained_by(caller: FrameType) -> Any | None:
    """Return our model if the recipe whose method calls trains it; else None.

    Any other caller counts as training the model of ours that lives, if one does.
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
