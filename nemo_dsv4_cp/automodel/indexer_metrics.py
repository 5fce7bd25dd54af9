# SPDX-License-Identifier: Apache-2.0
"""Adds the indexer's loss to the metrics that AutoModel's recipes log after each optimizer step."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

from nemo_dsv4_cp.automodel import patches
from nemo_dsv4_cp.options import ContextParallelOptions

FUNCTION = "log_train_metrics"
RECIPE = "nemo_automodel.recipes.llm.train_ft"
CLASS = "TrainFinetuneRecipeForNextTokenPrediction"
TAKE = "take_indexer_metrics"
"""The function by which a model computes the metrics of the step that ends, on all ranks."""
# Distillation has a method of its own, in place of fine-tuning's.
_CLASSES = {
    RECIPE: CLASS,
    "nemo_automodel.recipes.llm.kd": "KnowledgeDistillationRecipeForNextTokenPrediction",
}
_logger = logging.getLogger(__name__)


def install() -> None:
    """Have the recipes that are loaded log the indexer's loss; again does nothing."""
    importlib.import_module(RECIPE)
    for module, name in _CLASSES.items():
        if module in sys.modules:
            patches.wrap(getattr(sys.modules[module], name), FUNCTION, _with_indexer)


def _with_indexer(original: Any, self: Any, log_data: Any) -> Any:
    parts = [getattr(part, "module", part) for part in self.model_parts]
    take = getattr(parts[0], TAKE, None)
    if take is None or not ContextParallelOptions.of(parts[0].config).trains_indexer:
        return original(self, log_data)
    groups = [self._get_dp_group(include_cp=True), self._get_pp_group()]
    metrics = take(parts, groups, self._get_cp_group_size())
    if metrics and self.dist_env.is_main:
        log_data.metrics.update(metrics)
        _logger.info(
            "step %d | epoch %d | indexer loss %.4f | captured %.4f",
            log_data.step,
            log_data.epoch,
            metrics["indexer/loss"],
            metrics["indexer/captured"],
        )
    return original(self, log_data)
