# SPDX-License-Identifier: Apache-2.0
"""``rope_scaling`` as AutoModel's V4 reads it, whichever way it was spelled.

``DeepseekV4RotaryEmbedding`` (nemo_automodel 0.5 to 0.7) reads the key ``type`` alone, and knows
``yarn``. transformers writes ``rope_type``, and its own V4 nests the settings under ``main`` and
``compress``. Read by AutoModel, either trains without YaRN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}
_NO_SCALING = ("", "default")
_SCALES = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")


def resolve_rope_scaling(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a config's ``rope_scaling`` with the key that AutoModel reads.

    Nested as in transformers, ``compress`` holds the scaling of compressed layers.

    Raises:
        ValueError: For a scaling that AutoModel's V4 would leave out, and for contradictions.
    """
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise ValueError(f"rope_scaling={settings!r} is not a mapping; use one such as {_YARN}")
    if "main" in settings or "compress" in settings:
        if not all(isinstance(settings.get(key), Mapping) for key in ("main", "compress")):
            raise ValueError(
                f"rope_scaling={dict(settings)!r} nests main and compress, and both must be "
                f"mappings; use a flat one such as {_YARN}"
            )
        if _name(settings["main"]) not in _NO_SCALING:
            raise ValueError(
                f"rope_scaling.main={settings['main']!r}: DeepSeek-V4 scales compressed layers "
                "only; use {rope_type: default} for main"
            )
        settings = settings["compress"]
    name, fields = _name(settings), dict(settings)
    if name in _NO_SCALING:
        if unused := [key for key in _SCALES if key in fields]:
            raise ValueError(
                f"rope_scaling={fields!r} sets {unused[0]} and names no scaling, so that "
                f"AutoModel's DeepSeek-V4 would train without; add type: yarn, as in {_YARN}"
            )
        return fields
    if name != "yarn":
        raise ValueError(
            f"rope_scaling={fields!r}: AutoModel's DeepSeek-V4 knows yarn only and would train "
            f"without scaling; use one such as {_YARN}, or rope_scaling: null"
        )
    for key in _SCALES:
        if key not in fields and key not in _YARN:
            continue  # AutoModel has a default for it
        value, least = fields.get(key), 1 if key == "original_max_position_embeddings" else 0
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0 and value >= least):  # type: ignore[arg-type,operator]
            raise ValueError(
                f"rope_scaling.{key}={value!r} is not a positive number, and AutoModel's "
                f"DeepSeek-V4 would train without scaling; use one such as {_YARN.get(key, 1)}"
            )
    return fields | {"type": name, "rope_type": name}


def _name(settings: Mapping[str, Any]) -> str:
    """Return which scaling the settings name, in lower case."""
    names = {
        str(settings[key]).lower() for key in ("type", "rope_type") if settings.get(key) is not None
    }
    if len(names) > 1:
        raise ValueError(
            f"rope_scaling={dict(settings)!r} names two scalings, by type and by rope_type; leave "
            "one of the two out"
        )
    return names.pop() if names else ""
