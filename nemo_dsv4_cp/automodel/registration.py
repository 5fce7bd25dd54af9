# SPDX-License-Identifier: Apache-2.0
"""What naming our config class in YAML changes in this process: all of it, in one place.

The config calls :func:`register` unless it is switched off. A model's constructor patches nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from nemo_dsv4_cp.automodel import (
    contracts,
    fsdp,
    indexer_freeze,
    indexer_metrics,
    job,
    lora,
    resume,
)
from nemo_dsv4_cp.automodel.legacy import registration as legacy


def register(architecture: str, *, attribute_failures: Callable[[], None] | None = None) -> None:
    """Register our model class and install every patch; calling it again changes nothing.

    Args:
        architecture: The name that our config carries.
        attribute_failures: Replaces ``sys.excepthook``; None without
            ``context_parallel.failure_attribution``.
    """
    legacy.add_to_registry(architecture)
    legacy.shard_as_automodel(architecture)
    install_patches(attribute_failures)


def install_patches(attribute_failures: Callable[[], None] | None = None) -> None:
    """Replace functions of AutoModel and of the process; ``patches.undo()`` restores them all."""
    job.install()  # models learn distributed.cp_size, which AutoModel passes to none of them
    indexer_freeze.install()  # an indexer that has a loss is trained
    indexer_metrics.install()  # and its loss logged
    lora.install()  # LoRA skips the frozen indexer and refuses its grouped projection
    resume.install()  # dataloader and random state load at another cp_size
    contracts.batch_contract().install()  # recipes that do not call a model's own sharder
    legacy.let_models_bring_their_cp()  # 0.6 and 0.5 look at the attention backend alone
    fsdp.install()  # torch 2.15 has no method for AutoModel's FSDP2 patch to replace
    if attribute_failures is not None:
        attribute_failures()  # a failing rank prints first which rank failed first
