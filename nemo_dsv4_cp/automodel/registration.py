# SPDX-License-Identifier: Apache-2.0
"""Makes our architecture known to releases that look for none among entry points (before 0.7).

Naming our config class in YAML is what registers: the config calls :func:`register`, unless it is
switched off.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from nemo_automodel._transformers import capabilities
from nemo_automodel._transformers.registry import ModelRegistry

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.automodel import job, lora, patches


def register(architecture: str) -> None:
    """Register our model class under a name and let it bring its own CP; again does nothing.

    A release that finds the class by itself, and asks a model whether it owns its CP attention,
    keeps its own ways of both.
    """
    job.install()
    lora.install()
    registry: Any = ModelRegistry
    discovers = hasattr(type(registry), "_discover_entry_points")
    if not discovers and not registry.has_custom_model(architecture):
        model = plugins.load(plugins.ARCHITECTURES, architecture)
        registry.register(architecture, model, exist_ok=True)
    _shard_as_automodel(architecture)
    for name, owns in _OWNED.items():
        found = getattr(capabilities.ModelSupports, name)
        if not patches.is_replaced(capabilities.ModelSupports, name) and (
            owns not in inspect.getsource(found.fget)
        ):
            patches.replace(capabilities.ModelSupports, name, _asking_the_model(found, owns))


def _shard_as_automodel(architecture: str) -> None:
    """Have releases before 0.7 shard our class as AutoModel's V4, with its float32 FSDP units.

    They look the way to shard up by the exact name of the class; later ones ask the class.
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
"""What AutoModel decides, and the attribute by which a model says that it brings it along."""


def _asking_the_model(automodels_decision: property, owns: str) -> property:
    """AutoModel 0.6 and 0.5 go by the attention backend alone: TileLang's, or Transformer Engine's.

    Args:
        automodels_decision: AutoModel's property.
        owns: The model's attribute.
    """
    decide: Any = automodels_decision.fget

    def supports(self: Any) -> bool:
        return bool(getattr(self._model, owns, False) or decide(self))

    return property(supports)
