# SPDX-License-Identifier: Apache-2.0
"""Trains the indexer where ``context_parallel.indexer_loss`` asks for it.

AutoModel decides what is trained by freezing V4's indexer last, with no setting against it, each
time it replaced parameters of a model. That function is wrapped.
"""

from __future__ import annotations

from typing import Any

from nemo_automodel._transformers import infrastructure

from nemo_dsv4_cp.automodel import patches

FUNCTION = "freeze_deepseek_v4_indexer_params"
SELECT = "select_trained_parameters"
"""The method by which a model decides whether its indexer is trained."""
INDEXER = ".compressor.indexer."
"""In the names of the indexer's parameters."""


def install() -> None:
    """Have AutoModel leave the indexer's parameters to a model of ours; again does nothing."""
    patches.wrap(infrastructure, FUNCTION, _unless_the_model_does)


def _unless_the_model_does(original: Any, model: Any) -> None:
    select = getattr(model, SELECT, None)
    if select is None or not select():
        original(model)


def train_indexer(model: Any, *, alone: bool) -> None:
    """Set ``requires_grad`` of the indexer's parameters, and unset that of others if ``alone``.

    Raises:
        ValueError: If ``alone`` leaves nothing to train, for which AutoModel makes no optimizer.
    """
    parameters = dict(model.named_parameters())
    if alone and not any(INDEXER in name for name in parameters):
        raise ValueError(
            "context_parallel.train_only=indexer with a pipeline stage that has no layer of ratio "
            "4, and nothing to train; use a smaller distributed.pp_size, or train_only: all"
        )
    for name, parameter in parameters.items():
        if INDEXER in name:
            parameter.requires_grad_(True)
        elif alone:
            parameter.requires_grad_(False)
