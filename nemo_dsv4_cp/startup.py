# SPDX-License-Identifier: Apache-2.0
"""What a training run does, in one INFO block on rank 0 when the first batch arrives.

# B batch rows   L local tokens   V vocabulary
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

import torch

from nemo_dsv4_cp.attention.kernel_use import UsesKernels
from nemo_dsv4_cp.attention.layer import ContextParallelAttention
from nemo_dsv4_cp.attention.step import StepContext
from nemo_dsv4_cp.automodel import patches
from nemo_dsv4_cp.exchange.collectives import is_first_rank
from nemo_dsv4_cp.options import ContextParallelOptions

_logger = logging.getLogger(__name__)


def log_first_step(
    model: Any,
    tokens: torch.Tensor,
    *,
    cp_size: int,
    packed: bool,
    balancing: str,
    all_logits: bool,
    padding: str,
) -> None:
    """Log on rank 0 what the plugin does for a model, as AutoModel lists its own settings.

    Args:
        model: The model, or this rank's pipeline stage of it.
        tokens: The first shard that it trains on, [B, L, ..].
        cp_size: Ranks of the CP group, 1 without one.
        packed: Whether rows hold several documents.
        balancing: From :func:`balancing_of`.
        all_logits: Whether the loss reads logits of all positions, [B, L, V].
        padding: From :func:`padding_of_shard`.
    """
    if not is_first_rank():
        return
    options = ContextParallelOptions.of(model.config)
    rows, length = tokens.shape[:2]
    kernels = {m.kernels_name for m in model.modules() if isinstance(m, UsesKernels)}
    overlap = "overlapped with compute" if options.overlap else "waited for"
    exchange = f"{options.transport}, collectives {overlap}" if cp_size > 1 else "none"
    patched = patches.replaced_names()
    lines = [
        f"Context parallelism (nemo-dsv4-cp {version('nemo-dsv4-cp')}):",
        f"- cp_size: {cp_size}",
        f"- transport: {exchange}",
        f"- kernels: {', '.join(sorted(kernels))}",
        f"- load balancing ({options.balance}): {balancing if cp_size > 1 else 'none'}",
        f"- first batch: {rows} x {length} local tokens, "
        f"{'packed' if packed else 'one document per row'}, {padding}",
        f"- loss: {_loss(model, rows, length, all_logits)}",
        f"- patched: {len(patched)} functions of AutoModel and others (names at DEBUG)",
    ]
    if options.trains_indexer:
        loss = options.indexer_loss
        alone = ", and nothing else" if options.train_only == "indexer" else ""
        trained = f"trained{alone}, coefficient {loss.coefficient:g}, mode {loss.mode}"
        lines.append(f"- indexer: {trained}")
    if options.compressor_precision != "float32":
        lines.append(f"- compressors: {options.compressor_precision} for bfloat16 activations")
    _logger.info("\n".join(lines))
    _logger.debug("Patched: %s", ", ".join(patched))


def padding_of_shard(before: int | None, after: int | None, multiple: int) -> str:
    """Return how rows were padded, in words.

    ``before`` is None where documents were laid out again, ``after`` where nothing was sharded.
    """
    if after is None or before == after:
        return "not padded"
    if before is None:
        return f"documents end to end, rows padded to {after} tokens"
    return f"rows of {before} padded to {after} tokens (shards: multiple of {multiple})"


def balancing_of(model: Any, step: StepContext) -> str:
    """Return for each compress ratio whether its queries move to other ranks, in words."""
    attention = [m for m in model.modules() if isinstance(m, ContextParallelAttention)]
    of_ratio = {layer.compress_ratio: layer for layer in attention if layer.compress_ratio}
    return (
        ", ".join(
            f"ratio {ratio} {'on' if step.schedule(layer.kind).moves else 'off'}"
            for ratio, layer in sorted(of_ratio.items())
        )
        or "no compressed layers"
    )


def _loss(model: Any, rows: int, length: int, all_logits: bool) -> str:
    """Return what the loss reads, and how large it is."""
    if getattr(model, "lm_head", None) is None:
        return "on the last pipeline stage"
    if not all_logits:
        return "from hidden states, without logits of all positions"
    vocabulary = model.config.get_text_config().vocab_size
    mib = rows * length * vocabulary * 4 / 2**20
    return (
        f"from logits [{rows}, {length}, {vocabulary}], {mib:,.0f} MiB in float32; "
        "ChunkedCrossEntropy needs none"
    )
