# SPDX-License-Identifier: Apache-2.0
"""What naming our config class in YAML changes in this process: all of it, in one place.

The config calls :func:`register` unless it is switched off. A model's constructor patches nothing.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from nemo_automodel._transformers import capabilities
from nemo_automodel._transformers.registry import ModelRegistry

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.automodel import contracts, fsdp, job, lora, patches, resume


def register(architecture: str, *, attribute_failures: Callable[[], None] | None = None) -> None:
    """Register our model class and install every patch; calling it again changes nothing.

    Args:
        architecture: The name that our config carries.
        attribute_failures: Replaces ``sys.excepthook``; None without
            ``context_parallel.failure_attribution``.
    """
    _add_to_registry(architecture)
    _shard_as_automodel(architecture)
    install_patches(attribute_failures)


def install_patches(attribute_failures: Callable[[], None] | None = None) -> None:
    """Replace functions of AutoModel and of the process; ``patches.undo()`` restores them all."""
    job.install()  # models learn distributed.cp_size, which AutoModel passes to none of them
    lora.install()  # LoRA skips V4's frozen indexer and refuses its grouped projection
    resume.install()  # dataloader and random state load at another cp_size
    contracts.batch_contract().install()  # recipes that do not call a model's own sharder
    _let_models_bring_their_cp()  # 0.6 and 0.5 allow CP by the attention backend's name alone
    fsdp.install()  # torch 2.15 has no method for AutoModel's FSDP2 patch to replace
    if attribute_failures is not None:
        attribute_failures()  # a failing rank prints first which rank failed first


def _add_to_registry(architecture: str) -> None:
    """Add our class where a release does not look for it among entry points (before 0.7)."""
    registry: Any = ModelRegistry
    discovers = hasattr(type(registry), "_discover_entry_points")
    if not discovers and not registry.has_custom_model(architecture):
        model = plugins.load(plugins.ARCHITECTURES, architecture)
        registry.register(architecture, model, exist_ok=True)


def _shard_as_automodel(architecture: str) -> None:
    """Have releases before 0.7 shard our class as AutoModel's V4, with its float32 FSDP units.

    They look up how to shard by the exact name of the class; later ones read the class.
    """
    parallelizer = importlib.import_module("nemo_automodel.components.distributed.parallelizer")
    strategies: Any = getattr(parallelizer, "PARALLELIZATION_STRATEGIES", {})
    if _AUTOMODELS in strategies:
        strategies.setdefault(architecture, strategies[_AUTOMODELS])


_AUTOMODELS = "DeepseekV4ForCausalLM"
_OWNED = {
    "supports_cp": "_owns_cp_attention",
    "supports_cp_with_sequence_packing": "_owns_packed_attention",
}
"""What AutoModel decides, and the attribute by which a model declares it supported."""


def _let_models_bring_their_cp() -> None:
    """Have AutoModel read what a model declares; a release that reads it by itself stays as is."""
    for name, owns in _OWNED.items():
        found = getattr(capabilities.ModelSupports, name)
        if not patches.is_replaced(capabilities.ModelSupports, name) and (
            owns not in inspect.getsource(found.fget)
        ):
            patches.replace(capabilities.ModelSupports, name, _reading_the_model(found, owns))


def _reading_the_model(automodels_decision: property, owns: str) -> property:
    """AutoModel 0.6 and 0.5 look at the attention backend alone: TileLang, or Transformer Engine.

    Args:
        automodels_decision: AutoModel's property.
        owns: The model's attribute.
    """
    decide: Any = automodels_decision.fget

    def supports(self: Any) -> bool:
        return bool(getattr(self._model, owns, False) or decide(self))

    return property(supports)
