# SPDX-License-Identifier: Apache-2.0
"""Router replay (``moe_overrides.enable_routing_replay``) in models with hash layers.

Every gate registers itself for replay when it is created. In hash layers, V4 then replaces the gate
by another one. The old gate stays registered but never routes, and ``RouterReplay.collect`` raises
an error if a registered gate has recorded nothing. This module unregisters the old gates. Hash
layers route by token id alone and need no replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

_MODULE = "nemo_automodel.components.moe.router_replay"
HAS_REPLAY = find_spec(_MODULE) is not None
"""Whether AutoModel has router replay (since 0.6)."""


def registered() -> list[Any]:
    """Return AutoModel's registry of replaying gates, in the order they were made."""
    if not HAS_REPLAY:
        return []
    from nemo_automodel.components.moe.router_replay import RouterReplay

    registry: list[Any] = RouterReplay.instances()
    return registry


@contextmanager
def own_gates_only(model: Any) -> Iterator[None]:
    """Unregister the gates registered inside that the model has not at the end; all if it fails.

    Raises:
        ValueError: If a gate of the model cannot replay: a vision config's routes by itself.
    """
    registry = registered()
    first = len(registry)
    try:
        yield
        gates = [g for g in model.modules() if getattr(g, "router_replay", None) is not None]
        if any(hasattr(gate, "bias_vl") for gate in gates):
            raise ValueError(
                "moe_overrides.enable_routing_replay=True: the gates of a config with a vision "
                "tower (vision_n_layers > 0) record and replay nothing in AutoModel; set "
                "enable_routing_replay: false or vision_n_layers: 0"
            )
    except BaseException:
        del registry[first:]
        raise
    owned = {id(gate.router_replay) for gate in gates}
    registry[first:] = [replay for replay in registry[first:] if id(replay) in owned]
