# SPDX-License-Identifier: Apache-2.0
"""Which modules LoRA may change in our models.

AutoModel patches every ``nn.Linear`` whose name matches. Two kinds must stay out of it: the
grouped output projection ``wo_a``, whose forward a LoRA linear would replace by an ungrouped one,
and the frozen indexer, whose adapters would never train.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from nemo_automodel.components._peft import lora
from nemo_automodel.components._peft.module_matcher import ModuleMatcher
from nemo_automodel.components.models.deepseek_v4.layers import DeepseekV4GroupedLinear

from nemo_dsv4_cp.automodel import patches
from nemo_dsv4_cp.options import ContextParallelOptions

FUNCTION = "apply_lora_to_linear_modules"
RESOLVE = "resolve_lora_targets"
"""The method by which a model decides what LoRA may change."""

_INDEXER = ".indexer"
_logger = logging.getLogger(__name__)


def install() -> None:
    """Have AutoModel query a model of ours what LoRA may change; again does nothing."""
    patches.wrap(lora, FUNCTION, _resolving_first, everywhere=True)


def _resolving_first(original: Any, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
    resolve = getattr(model, RESOLVE, None)
    return original(model, resolve(peft_config) if resolve else peft_config, *args, **kwargs)


def resolve_targets(model: Any, peft_config: Any) -> Any:
    """Return a PEFT config that leaves the frozen indexer alone.

    Raises:
        ValueError: If it selects a grouped projection, or nothing but the indexer.
    """
    matcher = ModuleMatcher(
        peft_config.target_modules, peft_config.exclude_modules, peft_config.match_all_linear
    )
    matched = {
        name: module for name, module in model.named_modules() if matcher.match(module, name)
    }
    setting = _setting(peft_config)
    if ContextParallelOptions.of(model.config).trains_indexer:
        raise ValueError(
            f"{setting} with context_parallel.indexer_loss: LoRA freezes the indexer that the loss "
            "trains; set context_parallel.indexer_loss.coefficient: 0.0, or train without peft"
        )
    grouped = [n for n, module in matched.items() if isinstance(module, DeepseekV4GroupedLinear)]
    if grouped:
        raise ValueError(
            f"{setting} selects {grouped[0]}, a grouped linear (wo_a of {len(grouped)} layers), "
            'which LoRA cannot change; name modules instead, such as peft.target_modules: ["*wq_a",'
            ' "*wq_b", "*wkv", "*wo_b"], or use peft.exclude_modules: ["*wo_a", "*lm_head"] alone'
        )
    frozen = [name for name in matched if _INDEXER in name]
    if not frozen:
        return peft_config
    names = [name for name in matched if name not in frozen]
    if not names:
        raise ValueError(
            f"{setting} selects nothing but the indexer ({frozen[0]}), which is frozen: its "
            'adapters would never train; use such as peft.target_modules: ["*wq_a", "*wq_b"]'
        )
    _logger.info("LoRA: left out %d modules of the frozen indexer", len(frozen))
    return dataclasses.replace(
        peft_config, target_modules=names, exclude_modules=[], match_all_linear=False
    )


def _setting(peft_config: Any) -> str:
    """Return which setting selects the modules, as the recipe spells it."""
    for name in ("match_all_linear", "target_modules", "exclude_modules"):
        if value := getattr(peft_config, name):
            return f"peft.{name}={value!r}"
    return "peft without target_modules"
