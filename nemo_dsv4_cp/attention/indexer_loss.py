# SPDX-License-Identifier: Apache-2.0
"""The loss that trains V4's indexer, and how it enters the gradient of a step.

AutoModel freezes the indexer: top-k has no gradient. With ``context_parallel.indexer_loss``, each
CSA layer compares the softmax of its index scores with where attention's probability goes (KL
divergence, as in the report of DeepSeek-V3.2, section 2.1). The loss trains the indexer alone:
what it reads of the layer is detached.

# B batch rows   L local tokens   C queries   I index heads   F index width   P entries   n layers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from nemo_automodel.components.moe.megatron.moe_utils import MoEAuxLossAutoScaler

from nemo_dsv4_cp.automodel.torch_api import NO_BACKWARD, backward_id
from nemo_dsv4_cp.exchange.collectives import Group, all_reduce_sum
from nemo_dsv4_cp.kernels.protocol import IndexerLossTerms


def token_weights(
    padding_BL: torch.Tensor | None,
    rows: int,
    length: int,
    group: Group | None,
    device: torch.device,
) -> torch.Tensor:
    """Return what each local query weighs in the mean of its batch rows, float32 [B, L, 1].

    One over the number of real tokens of all CP ranks, which sum it; 0 for padding.

    Args:
        padding_BL: Bool, True = pad; None if all are real.
        rows: B.
        length: L.
        group: CP group, None without CP.
        device: Of the result.
    """
    real = torch.ones(rows, length, dtype=torch.float32, device=device)
    if padding_BL is not None:
        real = real.masked_fill(padding_BL, 0)
    count = all_reduce_sum(real.sum(), [group]).clamp(min=1)
    return (real / count)[..., None]


class _Gradients(torch.autograd.Function):
    """A loss whose gradients are known: its backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        weights: torch.Tensor,
        keys: torch.Tensor,
        compute: Callable[[], IndexerLossTerms],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        terms = compute()
        ctx.save_for_backward(terms.grad_q_BLIF, terms.grad_weights_BLI, terms.grad_keys_BPF)
        ctx.mark_non_differentiable(terms.captured)
        return terms.loss, terms.captured

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        return *(grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors), None


def loss_of(
    q_BCIF: torch.Tensor,
    weights_BCI: torch.Tensor,
    keys_BPF: torch.Tensor,
    compute: Callable[[], IndexerLossTerms],
) -> torch.Tensor:
    """Return a layer's loss and what it captured of some queries, float32 [2].

    Args:
        q_BCIF: Index queries, whose gradient is the loss's; so with the next two.
        weights_BCI: Weights of the index heads.
        keys_BPF: Index keys of all ranks.
        compute: The kernels' ``indexer_loss`` of them.
    """
    if not q_BCIF.shape[1]:  # other ranks wait for this rank's gradients
        nothing = q_BCIF.sum() + weights_BCI.sum() + keys_BPF[:, :0].sum()
        return torch.stack((nothing, nothing.detach())).float()
    loss_captured: torch.Tensor = _computed(q_BCIF, weights_BCI, keys_BPF, compute)
    return loss_captured


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _computed(*arguments: Any) -> torch.Tensor:
    return torch.stack(_Gradients.apply(*arguments))  # type: ignore[no-untyped-call]


class IndexerLossSums:
    """What the layer's losses were since they were last read, for the log.

    Attributes:
        forwards: How many forwards they are of.
    """

    def __init__(self) -> None:
        self.forwards = 0
        self._sums: torch.Tensor | None = None

    def __deepcopy__(self, memo: Any) -> IndexerLossSums:
        return IndexerLossSums()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def add(self, loss_captured: torch.Tensor) -> None:
        """Add a forward's, float32 [2]; a recomputation's are those of its forward."""
        if backward_id() != NO_BACKWARD:
            return
        latest = loss_captured.detach()
        self._sums = latest if self._sums is None else self._sums + latest
        self.forwards += 1

    def take(self) -> torch.Tensor | None:
        """Return this rank's mean loss and captured share, float32 [2], and begin again."""
        taken = None if self._sums is None else self._sums / self.forwards
        self.forwards, self._sums = 0, None
        return taken


def step_metrics(
    model_parts: Sequence[Any], groups: Sequence[Group | None], cp_size: int
) -> dict[str, float]:
    """Return the layers' losses and captured shares since they were last taken, named for logs.

    They are of the whole batch: sums over CP ranks, means over data-parallel ranks and
    microbatches. First come the means over layers. All ranks call this together.

    Args:
        model_parts: This rank's model, or its pipeline stages of it.
        groups: Of data-parallel and CP ranks, and of pipeline stages, which have other layers.
        cp_size: Ranks that share a row.
    """
    config = model_parts[0].config
    device = next(model_parts[0].parameters()).device
    sums_n3 = torch.zeros(len(config.compress_ratios), 3, device=device)
    for module in (module for part in model_parts for module in part.modules()):
        losses: IndexerLossSums | None = getattr(module, "indexer_losses", None)
        if losses is not None and (taken := losses.take()) is not None:
            sums_n3[module.layer_idx, :2] += taken
            sums_n3[module.layer_idx, 2] += 1  # ranks that have the layer
    of_layers = {}
    for layer, (loss, captured, ranks) in enumerate(all_reduce_sum(sums_n3, groups).tolist()):
        if ranks:
            depth = layer - config.num_hidden_layers
            name = f"layer_{layer}" if depth < 0 else f"mtp_{depth}"
            of_layers[name] = torch.tensor((loss, captured)) * cp_size / ranks
    if not of_layers:
        return {}
    means = {"indexer": torch.stack(list(of_layers.values())).mean(0)}
    means |= {f"indexer/{name}": of_layer for name, of_layer in of_layers.items()}
    return {
        f"{name}/{what}": value
        for name, both in means.items()
        for what, value in zip(("loss", "captured"), both.tolist(), strict=True)
    }


def with_loss(out: torch.Tensor, loss: torch.Tensor, coefficient: float) -> torch.Tensor:
    """Return ``out``, whose gradient brings that of the loss with it, as AutoModel's gates do."""
    scaled: torch.Tensor = MoEAuxLossAutoScaler.apply(out, coefficient * loss)
    return scaled
