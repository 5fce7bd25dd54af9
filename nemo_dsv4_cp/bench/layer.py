# SPDX-License-Identifier: Apache-2.0
"""One attention layer of V4-Flash as a rank of a context-parallel group would run it."""

# B batch rows   L local tokens   E hidden   S global tokens

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.deepseek_v4 import layers as automodel_layers
from nemo_automodel.components.moe.megatron.moe_utils import MoEAuxLossAutoScaler

from nemo_dsv4_cp import DeepseekV4ContextParallelConfig
from nemo_dsv4_cp.attention import ContextParallelAttention
from nemo_dsv4_cp.attention.step import STEP_KEY, StepContext
from nemo_dsv4_cp.options import AUTO, ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, SequenceLayout
from nemo_dsv4_cp.tools.crossings import AUTOMODEL


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        path: ``"automodel"`` or the name of a transport.
        ratio: Compress ratio of the layer: 0, 4 or 128.
        seq_len: S, tokens in the whole row.
        cp_size: R, number of CP ranks.
        rank: Which of them is measured.
        batch: B, rows.
        workspace_mib: ``context_parallel.workspace_mib`` of a transport.
        kernels: ``context_parallel.kernels`` of a transport.
        balance: ``context_parallel.balance`` of a transport.
        overlap: ``context_parallel.overlap`` of a transport.
        documents: Where documents start in packed rows, ascending from 0; none for one document.
        indexer_loss: ``context_parallel.indexer_loss.mode`` of a transport, None without a loss.
        layer: Index of a layer of V4.1-Flash, whose ratio ``ratio`` is; None for V4-Flash.
    """

    path: str
    ratio: int
    seq_len: int
    cp_size: int
    rank: int
    batch: int = 1
    workspace_mib: int | str = ContextParallelOptions.workspace_mib
    kernels: str = AUTO
    balance: str = AUTO
    overlap: bool = True
    documents: tuple[int, ...] = ()
    indexer_loss: str | None = None
    layer: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The ``context_parallel`` block; AutoModel's own path reads nothing of it."""
        options: dict[str, Any] = {"workspace_mib": self.workspace_mib}
        if self.path != AUTOMODEL:
            options |= {"transport": self.path, "kernels": self.kernels}
            options |= {"balance": self.balance, "overlap": self.overlap}
        if self.trains_indexer:
            options["indexer_loss"] = {"coefficient": 0.01, "mode": self.indexer_loss}
        return options

    @property
    def trains_indexer(self) -> bool:
        """Whether the layer has an indexer that has a loss."""
        return self.indexer_loss is not None and self.ratio == OVERLAP_RATIO

    @property
    def layout(self) -> SequenceLayout:
        """Positions of the measured rank's tokens."""
        layout = SequenceLayout.of_padded(self.seq_len, cp_rank=self.rank, cp_size=self.cp_size)
        if not self.documents:
            return layout
        starts = torch.tensor([self.documents]).repeat(self.batch, 1)
        bounds = ((*self.documents, self.seq_len),) * self.batch  # fake tensors have no values
        return replace(layout, bounds=bounds, starts=starts)


@dataclass(frozen=True, eq=False)
class Output:
    """What a layer's forward returned.

    Attributes:
        hidden_BLE: Its output.
        carried: What later layers use, too: the state that V4.1's layers hand on.
        sums_gradients: Whether later layers return no gradient of that, but add it to a sum.
    """

    hidden_BLE: torch.Tensor
    carried: tuple[torch.Tensor, ...] = ()
    sums_gradients: bool = False

    def backward(self) -> None:
        """Run backward, with memory as it is for gradients."""
        returned = (self.hidden_BLE, *(() if self.sums_gradients else self.carried))
        made = [each for each in returned if each.grad_fn is not None]
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        try:
            torch.autograd.backward(made, [torch.empty_like(each) for each in made])
        finally:  # a fake tensor must not stay where AutoModel keeps it for later steps
            MoEAuxLossAutoScaler.main_loss_backward_scale = scale


Forward = Callable[[], Output]


def build(
    case: Case,
    group: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn: str = "sdpa",
    **sizes: Any,
) -> Forward:
    """Build the layer and its input, and return its forward.

    It runs as in AutoModel's model, including the dense mask. The input and all parameters take
    gradients, the indexer's only if it has a loss. ``attn`` is AutoModel's attention backend,
    ``sizes`` the fields of the config that differ from V4-Flash.
    """
    config = DeepseekV4ContextParallelConfig(
        compress_ratios=[case.ratio], num_hidden_layers=1, context_parallel=case.options, **sizes
    )
    cls = (
        automodel_layers.DeepseekV4Attention if case.path == AUTOMODEL else ContextParallelAttention
    )
    backend = BackendConfig(attn=attn, linear="torch", rms_norm="torch_fp32")
    # What AutoModel keeps in float32 (sinks, compressor projections) it makes so itself.
    with default_dtype(dtype), device:
        layer = cls(config, 0, backend).train()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(case.trains_indexer or ".indexer." not in name)
    layer._cp_group = group

    layout = case.layout
    length = layout.local_len
    with device:
        rotary = automodel_layers.DeepseekV4RotaryEmbedding(
            160000.0, config.head_dim, config.qk_rope_head_dim / config.head_dim
        )
        hidden = torch.randn(case.batch, length, config.hidden_size, dtype=dtype).requires_grad_()
        positions = layout.positions(device).expand(case.batch, -1)
        rope = rotary(hidden, positions)

    step = StepContext(layout, group, config.context_parallel)
    if case.path != AUTOMODEL:
        step.plan(layer.kind, device)
    if case.trains_indexer:
        share = torch.full((case.batch, length, 1), 1 / case.seq_len, device=device)
        step.loss_weights_BL1 = share

    def forward() -> Output:
        mask = None
        if case.path == AUTOMODEL:
            from nemo_automodel.components.models.deepseek_v4.cp import (
                build_dsv4_cp_causal_padding_mask,
            )

            mask = build_dsv4_cp_causal_padding_mask(
                position_ids=positions,
                key_len=case.seq_len,
                dtype=dtype,
                device=device,
                cp_group=group,
                sliding_window=config.sliding_window,
            )
        out = layer(
            hidden,
            rope,
            attention_mask=mask,
            position_embeddings_compress=rope,
            rotary_compress=rotary,
            position_ids=positions,
            **({STEP_KEY: step} if case.path != AUTOMODEL else {}),
        )
        return Output(out[0])

    return forward


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new floating-point tensors of a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
