# SPDX-License-Identifier: Apache-2.0
"""Makes AutoModel's knowledge-distillation recipe shard batches with the model's own sharder.

Unpatched, the recipe (nemo_automodel 0.7.0, ``recipes/llm/kd.py``) never calls the model's sharder,
so under CP the rows would be in another order than attention here expects. After sharding, the
recipe reads the label tensor that it passed in; that tensor must therefore be sharded in place.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

from nemo_dsv4_cp.automodel import patches
from nemo_dsv4_cp.automodel.contracts import UnsupportedAutoModel
from nemo_dsv4_cp.automodel.job import cp_size_of
from nemo_dsv4_cp.automodel.sharding import ContextParallelSharder

_RECIPE = "nemo_automodel.recipes.llm.kd"


class DistillationSharder(ContextParallelSharder):
    """AutoModel's sharder, which calls a model that owns its CP and shards labels in place."""

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        self._shards_labels = getattr(model, "_owns_cp_attention", False)
        if self._shards_labels:
            kwargs["invoke_pre_embed"] = True
            # The model's sharder finds every per-token tensor of the batch itself.
            kwargs.pop("extra_seq_buffers", None)
        super().__init__(model, *args, **kwargs)

    def shard(self, batch: dict[str, Any]) -> Any:
        """Shard the batch, and with it the labels that were passed as ``loss_mask``."""
        context, batch = super().shard(batch)
        labels = self._loss_mask
        if self._shards_labels and labels is not None and "labels" in batch:
            with torch.no_grad():
                labels.set_(batch.pop("labels"))
        return context, batch


def install() -> None:
    """Give the recipe our sharder, if it is the one that runs; again does nothing.

    Raises:
        UnsupportedAutoModel: If the recipe is not as we know it.
    """
    kd: Any = sys.modules.get(_RECIPE)
    if kd is None or patches.is_replaced(kd, "ContextParallelSharder"):
        return
    source = inspect.getsource(kd)
    if kd.ContextParallelSharder is not ContextParallelSharder or (
        source.count("invoke_pre_embed=False") != 2
    ):
        raise UnsupportedAutoModel(
            f"{_RECIPE} cuts batches in a way of its own, and distillation under CP would train on "
            "rows in another order"
        )
    patches.replace(kd, "ContextParallelSharder", DistillationSharder)
    patches.wrap(kd, "_build_teacher_model", _checking_teacher)


def _checking_teacher(build: Any, *args: Any, **kwargs: Any) -> Any:
    teacher = build(*args, **kwargs)
    cp_size = cp_size_of(teacher)
    if cp_size > 1 and not getattr(teacher, "_owns_cp_attention", False):
        raise ValueError(
            f"the teacher {type(teacher).__name__} would see this rank's shard alone at "
            f"distributed.cp_size={cp_size}; give teacher_model the config class "
            "nemo_dsv4_cp.DeepseekV4ContextParallelConfig as well, or set distributed.cp_size: 1"
        )
    return teacher
