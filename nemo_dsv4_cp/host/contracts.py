"""Chooses the adapter by what the host has: its sharder contract, or its batch function."""

from __future__ import annotations

from typing import Any

from nemo_dsv4_cp.host.sharding import HAS_SHARDER


def install(model: Any) -> None:
    """Make the host's recipes cut batches as a model of ours asks; again changes nothing."""
    if HAS_SHARDER:
        from nemo_dsv4_cp.host import distillation, token_verbs

        token_verbs.install()
        distillation.install()
    else:
        from nemo_dsv4_cp.host import cp_utils_hook

        cp_utils_hook.install(model)
