# SPDX-License-Identifier: Apache-2.0
"""``make_cp_batch_and_ctx`` of AutoModel 0.5's ``cp_utils``, on every release.

Training loops written for it keep working: a function found in the batch under
``_cp_make_batch_fn`` shards it, as in the nightlies after 0.5, else the model's own sharder does.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch

from nemo_dsv4_cp.automodel.sharding import HAS_SHARDER, ContextParallelSharder

BATCH_FN_KEY = "_cp_make_batch_fn"
"""Batch key of a function ``(cp_mesh, tp_mesh, batch, *, loss_mask, padding_token_id)``."""


def submeshes(device_mesh: Any) -> tuple[Any, Any]:
    """Return a job's CP and TP meshes, None for dimensions that it has not."""
    names = getattr(device_mesh, "mesh_dim_names", None) or ()
    cp_mesh, tp_mesh = (device_mesh[name] if name in names else None for name in ("cp", "tp"))
    return cp_mesh, tp_mesh


def cut_with(
    batch_fn: Callable[..., Any],
    device_mesh: Any,
    batch: dict[str, Any],
    *,
    loss_mask: torch.Tensor | None,
    padding_token_id: int,
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Call a batch function as AutoModel does; return a context factory and the sharded batch."""
    context, batch, *_ = batch_fn(
        *submeshes(device_mesh), batch, loss_mask=loss_mask, padding_token_id=padding_token_id
    )
    return context or contextlib.nullcontext, batch


def make_cp_batch_and_ctx(
    device_mesh: Any,
    batch: dict[str, Any],
    loss_mask: torch.Tensor | None = None,
    use_te: bool = False,
    padding_token_id: int = 0,
    num_chunks: int = 1,
    seq_lens_padding_value: int = -1000,
    *,
    model: Any = None,
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Shard a batch for this CP rank; return the context factory of its forward and the shard.

    Args:
        device_mesh: The job's mesh, with or without dimensions ``cp`` and ``tp``; None for one
            process.
        batch: The full batch, changed in place.
        loss_mask: Optional [B, S]; stands in for missing labels, else is sharded too.
        use_te: Not supported here: AutoModel's sharder inspects the model itself.
        padding_token_id: Pad value of ``input_ids``.
        num_chunks: Pipeline microbatches.
        seq_lens_padding_value: -1000, what fills up rows of fewer documents.
        model: The model whose sharder serves a batch that carries no function.

    Raises:
        ValueError: For ``use_te``, or another ``seq_lens_padding_value``.
    """
    batch_fn = batch.pop(BATCH_FN_KEY, None)
    if batch_fn is None and not HAS_SHARDER and model is None:
        automodel = importlib.import_module("nemo_automodel.components.distributed.cp_utils")
        cut: tuple[Callable[..., Any], dict[str, Any]] = automodel.make_cp_batch_and_ctx(
            device_mesh,
            batch,
            loss_mask,
            use_te,
            padding_token_id,
            num_chunks,
            seq_lens_padding_value,
        )
        return cut
    if use_te or seq_lens_padding_value != -1000:
        raise ValueError(
            f"make_cp_batch_and_ctx(use_te={use_te}, seq_lens_padding_value="
            f"{seq_lens_padding_value}) is not supported; leave both out, and pass model= for "
            "models of Transformer Engine"
        )
    if batch_fn is None and HAS_SHARDER:
        sharder = ContextParallelSharder(
            model,
            device_mesh,
            batch,
            padding_token_id=padding_token_id,
            num_chunks=num_chunks,
            loss_mask=loss_mask,
        )
        cut = sharder.shard(batch)
        return cut
    if batch_fn is None:
        batch_fn = model.prepare_model_inputs_for_cp(batch)["cp_sharder"].shard_batch
    return cut_with(
        batch_fn, device_mesh, batch, loss_mask=loss_mask, padding_token_id=padding_token_id
    )
