"""Our batch function inside ``cp_utils.make_cp_batch_and_ctx``, where recipes call that (0.5).

The host's function cuts every model's batch alike, for torch's ring attention. While a model of
ours lives, batches go to its own batch function; any other model's go to the host's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import weakref
from typing import Any

_NAME = "make_cp_batch_and_ctx"
_MODULE = "nemo_automodel.components.distributed.cp_utils"
_EXPECTED = ["device_mesh", "batch", "loss_mask", "use_te", "padding_token_id", "num_chunks"]
_models: weakref.WeakSet[Any] = weakref.WeakSet()
_undo: list[tuple[Any, Any]] = []


def install(model: Any) -> None:
    """Let ``model`` cut its own batches; for every module that imported the host's function.

    Raises:
        RuntimeError: If the host's function takes other arguments than those we know.
    """
    _models.add(model)
    if _undo:
        return
    original = getattr(importlib.import_module(_MODULE), _NAME)
    found = list(inspect.signature(original).parameters)
    if found[: len(_EXPECTED)] != _EXPECTED:
        raise RuntimeError(
            f"{_MODULE}.{_NAME} takes {found}, and nemo_dsv4_cp knows it with {_EXPECTED}; install "
            "a tested nemo_automodel (0.5.0, 0.6.0 or 0.7.0)"
        )
    wrapped = _wrapped(original)
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(_NAME) is original:
            setattr(module, _NAME, wrapped)
            _undo.append((module, original))


def uninstall() -> None:
    """Give every module the host's function back."""
    while _undo:
        module, original = _undo.pop()
        setattr(module, _NAME, original)
    _models.clear()


def _wrapped(original: Any) -> Any:
    @functools.wraps(original)
    def make_cp_batch_and_ctx(
        device_mesh: Any,
        batch: dict[str, Any],
        loss_mask: Any = None,
        use_te: bool = False,
        padding_token_id: int = 0,
        **kwargs: Any,
    ) -> Any:
        names = getattr(device_mesh, "mesh_dim_names", None) or ()
        meshes = [device_mesh[name] if name in names else None for name in ("cp", "tp")]
        batch_fn = batch.pop("_cp_make_batch_fn", None)
        model = next(iter(_models), None)
        if batch_fn is None and model is not None and meshes[0] is not None:
            batch_fn = model.prepare_model_inputs_for_cp(batch)["cp_sharder"].shard_batch
        if batch_fn is None:
            return original(device_mesh, batch, loss_mask, use_te, padding_token_id, **kwargs)
        context, batch, *_ = batch_fn(
            *meshes, batch, loss_mask=loss_mask, padding_token_id=padding_token_id
        )
        return context or contextlib.nullcontext, batch

    return make_cp_batch_and_ctx
