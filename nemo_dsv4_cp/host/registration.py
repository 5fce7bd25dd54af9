"""Makes our architecture known to hosts that look for none among entry points (before 0.7).

Naming our config class in YAML is what registers: the config calls :func:`register`, unless it is
switched off.
"""

from __future__ import annotations

import inspect
from typing import Any

from nemo_automodel._transformers import capabilities
from nemo_automodel._transformers.registry import ModelRegistry

from nemo_dsv4_cp.host import patches


def register(architecture: str) -> None:
    """Register our model class under a name and let it bring its own CP; again does nothing.

    A host that finds the class by itself, and asks a model whether it owns its CP attention, is
    left as it is.
    """
    registry: Any = ModelRegistry
    discovers = hasattr(type(registry), "_discover_entry_points")
    if not discovers and not registry.has_custom_model(architecture):
        from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM

        registry.register(architecture, DeepseekV4ContextParallelForCausalLM, exist_ok=True)
    host_supports_cp = capabilities.ModelSupports.supports_cp
    if "_owns_cp_attention" not in inspect.getsource(host_supports_cp.fget):
        patches.replace(
            capabilities.ModelSupports, "supports_cp", property(_supports_cp(host_supports_cp))
        )


def _supports_cp(host_supports_cp: Any) -> Any:
    """AutoModel 0.6 goes by the attention backend alone and wants TileLang's of any V4."""

    def supports_cp(self: Any) -> bool:
        """Whether the model supports context parallelism (``_owns_cp_attention``, or the host)."""
        return bool(
            getattr(self._model, "_owns_cp_attention", False) or host_supports_cp.fget(self)
        )

    return supports_cp
