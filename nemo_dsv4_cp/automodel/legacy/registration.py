# SPDX-License-Identifier: Apache-2.0
"""What AutoModel 0.5 and 0.6 need to find, shard and accept our class as their own V4."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from nemo_automodel._transformers import capabilities
from nemo_automodel._transformers.registry import ModelRegistry

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.automodel import patches


def add_to_registry(architecture: str) -> None:
    """Add our class where a release does not look for it among entry points (before 0.7)."""
    registry: Any = ModelRegistry
    discovers = hasattr(type(registry), "_discover_entry_points")
    if not discovers and not registry.has_custom_model(architecture):
        model = plugins.load(plugins.ARCHITECTURES, architecture)
        registry.register(architecture, model, exist_ok=True)


def shard_as_automodel(architecture: str) -> None:
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


def let_models_bring_their_cp() -> None:
    """Have AutoModel read what a model declares; a release that reads it by itself stays as is."""
    for name, owns in _OWNED.items():
        found = getattr(capabilities.ModelSupports, name)
        if not patches.is_replaced(capabilities.ModelSupports, name) and (
            owns not in inspect.getsource(found.fget)
        ):
            patches.replace(capabilities.ModelSupports, name, _reading_the_model(found, owns))


def _reading_the_model(automodels_decision: property, owns: str) -> property:
    """Return AutoModel's property, which looks at the backend alone, or what a model declares."""
    decide: Any = automodels_decision.fget

    def supports(self: Any) -> bool:
        return bool(getattr(self._model, owns, False) or decide(self))

    return property(supports)
