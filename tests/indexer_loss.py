# SPDX-License-Identifier: Apache-2.0
"""The indexer's loss of a layer, dense and in float64, straight from its definition.

Every document is computed alone, with all its queries and entries at once; gradients are
autograd's. Nothing here is the package's.
"""

# S tokens of a document   E hidden   A query rank   N heads   D head_dim   I index heads
# F index width   n entries   r compress ratio, 4

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

RATIO = 4
INDEXER = "compressor.indexer."


@dataclass
class IndexerLoss:
    """What the loss of a layer is, and how close to another choice its numbers are.

    Attributes:
        loss: Mean over real tokens of KL(target || prediction).
        captured: Mean over real tokens of the selected entries' share of attention's probability:
            of what went to visible entries in mode full, of all in mode sparse.
        gradients: Of the loss, by the indexer's parameter.
        margin: The smallest of: index scores' distance from a zero of relu, and the gap between the
            last selected entry's score and the first that is not, relative to the largest of the
            document. Where float32 may fall on the other side, its loss is that of another choice.
    """

    loss: float
    captured: float
    gradients: dict[str, torch.Tensor]
    margin: float


def indexer_loss(
    state: Mapping[str, torch.Tensor],
    config: Any,
    hidden_BSE: torch.Tensor,
    documents: list[list[int]],
    *,
    full: bool,
    theta: float,
) -> IndexerLoss:
    """Compute the loss of a layer of ratio 4.

    Args:
        state: The attention layer's state dict.
        config: Its sizes.
        hidden_BSE: What the layer gets.
        documents: Lengths of each row's documents, from its first token on; tokens after them are
            padding.
        full: Over all visible entries, not the selected ones.
        theta: Base of the rotary frequencies.
    """
    weights = {name: tensor.detach().double() for name, tensor in state.items()}
    trained = {n: t.requires_grad_() for n, t in weights.items() if n.startswith(INDEXER)}
    loss, captured, margin = torch.zeros((), dtype=torch.float64), 0.0, 1.0
    for row, lengths in enumerate(documents):
        for document in hidden_BSE[row, : sum(lengths)].double().split(lengths):
            layer = _Layer(weights, config, document.detach(), theta)
            if layer.n_entries:
                of_document = layer.loss(full=full)
                loss, captured = loss + of_document[0], captured + float(of_document[1])
                margin = min(margin, layer.margin())
    real = sum(map(sum, documents))
    loss = loss + sum(0 * tensor.sum() for tensor in trained.values())  # if no entry is there
    grads = torch.autograd.grad(loss / real, list(trained.values()))
    gradients = dict(zip(trained, grads, strict=True))
    return IndexerLoss(float(loss.detach()) / real, captured / real, gradients, margin)


class _Layer:
    """A ratio-4 layer on one document."""

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        config: Any,
        hidden_SE: torch.Tensor,
        theta: float,
    ) -> None:
        self.weights, self.config, self.hidden, self.theta = weights, config, hidden_SE, theta
        self.positions = torch.arange(len(hidden_SE))
        self.n_entries = len(hidden_SE) // RATIO
        low = self._linear("wq_a", hidden_SE)
        self.low = self._norm(low, "q_norm")
        places = torch.arange(self.n_entries)
        self.visible_Sn = places < (self.positions[:, None] + 1) // RATIO
        self.scores_Sn, self.dots_SIn = self._index_scores()
        hidden_scores = self.scores_Sn.detach().masked_fill(~self.visible_Sn, -torch.inf)
        # Stable: of equal scores the earlier entry is selected.
        self.sorted, order = hidden_scores.sort(dim=-1, descending=True, stable=True)
        chosen = torch.zeros_like(self.visible_Sn)
        chosen.scatter_(1, order[:, : config.index_topk], True)
        self.chosen_Sn = chosen & self.visible_Sn

    def loss(self, *, full: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sums over queries of the KL divergence, and of the captured share."""
        allowed = self.visible_Sn if full else self.chosen_Sn
        some = allowed.any(dim=-1)
        of_entries = self._attention(allowed).detach()[some]  # [T, n]
        total = of_entries.sum(dim=-1, keepdim=True)
        target = of_entries / total
        predicted = self.scores_Sn.masked_fill(~allowed, -torch.inf)[some].softmax(dim=-1)
        terms = torch.xlogy(target, target) - target * predicted.clamp(min=1e-300).log()
        if full:
            captured = (target * self.chosen_Sn[some]).sum()
        else:
            captured = total.sum() / self.config.num_attention_heads
        return terms.sum(), captured

    def margin(self) -> float:
        """Return what :class:`IndexerLoss` says of this document."""
        topk = self.config.index_topk
        dots = self.dots_SIn.detach().transpose(1, 2)[self.visible_Sn].abs()
        found = float(dots.min() / dots.max())
        if topk < self.n_entries:
            last, first = self.sorted[:, topk - 1], self.sorted[:, topk]
            gaps = (last - first)[first.isfinite()]
            largest = self.scores_Sn.detach()[self.visible_Sn].abs().max()
            found = min(found, float(gaps.min() / largest))
        return found

    def _attention(self, allowed_Sn: torch.Tensor) -> torch.Tensor:
        """Return attention's probabilities of entries, summed over heads, [S, n]."""
        config, length = self.config, len(self.hidden)
        q = self._linear("wq_b", self.low).unflatten(-1, (config.num_attention_heads, -1))
        q_SND = self._rotated(self._norm(q), self.positions[:, None])
        raw_SD = self._norm(self._linear("wkv", self.hidden), "kv_norm")
        raw_SD = self._rotated(raw_SD, self.positions)
        keys = torch.cat((raw_SD, self._compressed("compressor.", self.hidden)))
        before = self.positions[:, None] - self.positions
        in_window = (before >= 0) & (before < config.sliding_window)
        seen = torch.cat((in_window, allowed_Sn), dim=-1)
        logits = torch.einsum("snd,kd->snk", q_SND, keys) * config.head_dim**-0.5
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
        sinks = self.weights["sinks_param.weight"].expand(length, -1)[..., None]
        probabilities = torch.cat((logits, sinks), dim=-1).softmax(dim=-1)
        return probabilities[..., length:-1].sum(dim=1)

    def _index_scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return index scores [S, n] and the products [S, I, n] that they are made of."""
        heads = self.config.index_n_heads
        q = self._linear(f"{INDEXER}wq_b", self.low.detach()).unflatten(-1, (heads, -1))
        q_SIF = self._rotated(q, self.positions[:, None])
        keys_nF = self._compressed(INDEXER, self.hidden)
        weights_SI = self._linear(f"{INDEXER}weights_proj", self.hidden)
        weights_SI = weights_SI * heads**-0.5 * self.config.index_head_dim**-0.5
        dots = torch.einsum("sif,nf->sin", q_SIF, keys_nF)
        return torch.einsum("si,sin->sn", weights_SI, dots.relu()), dots

    def _compressed(self, name: str, hidden_SE: torch.Tensor) -> torch.Tensor:
        """Return entries [n, D]: each pools its window and, with other features, the one before."""
        whole = hidden_SE[: self.n_entries * RATIO]
        values = self._linear(f"{name}wkv", whole).unflatten(0, (-1, RATIO))  # [n, r, 2 D]
        gates = self._linear(f"{name}wgate", whole).unflatten(0, (-1, RATIO))
        gates = gates + self.weights[f"{name}ape_param.weight"]
        (earlier, own), (earlier_gates, own_gates) = (t.chunk(2, dim=-1) for t in (values, gates))
        nothing = torch.zeros_like(earlier[:1])
        values = torch.cat((torch.cat((nothing, earlier[:-1])), own), dim=1)
        never = nothing - torch.inf
        gates = torch.cat((torch.cat((never, earlier_gates[:-1])), own_gates), dim=1)
        pooled = (values * gates.softmax(dim=1)).sum(dim=1)
        places = torch.arange(self.n_entries) * RATIO
        return self._rotated(self._norm(pooled, f"{name}kv_norm"), places)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def _norm(self, x: torch.Tensor, name: str | None = None) -> torch.Tensor:
        normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.config.rms_norm_eps)
        return normed if name is None else normed * self.weights[f"{name}.weight"]

    def _rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Turn pairs of neighbors among the last features of ``x``, whose rows are at positions."""
        width = self.config.qk_rope_head_dim
        powers = torch.arange(0, width, 2).float() / width
        # Angles are the layer's inputs, in float32 as AutoModel makes them.
        angles = (positions[..., None].float() * (1.0 / self.theta**powers)).double()
        rest, turned = x[..., :-width], x[..., -width:].unflatten(-1, (-1, 2))
        a, b = turned.unbind(dim=-1)
        c, s = angles.cos(), angles.sin()
        turned = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
        return torch.cat((rest, turned), dim=-1)
