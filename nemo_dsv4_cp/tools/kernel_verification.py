# SPDX-License-Identifier: Apache-2.0
"""Whether kernels compute what the torch path computes, at a model's own sizes, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.config import DeepseekV4ContextParallelConfig
from nemo_dsv4_cp.kernels.protocol import Kernels, Rope
from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, SequenceLayout
from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries
from nemo_dsv4_cp.tools.layer_kernels import attend, attention_tensors, selection
from nemo_dsv4_cp.tools.verification import GRADIENT_LIMIT, OUTPUT_LIMIT, Difference

_SIZES = (
    "compress_ratios",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "o_groups",
    "sliding_window",
    "rms_norm_eps",
)
_ROW = 16384
_SHARD = 256
_SHARD_ON_CPU = 4
"""An interpreter takes seconds for a few queries of V4's size."""

Run = Callable[..., torch.Tensor]


def verify_kernels(
    fields: Mapping[str, Any], name: str, *, dtype: torch.dtype, workspace_bytes: int
) -> list[Difference]:
    """Run every operation of a model's layers, with gradients, and compare it with the torch path.

    The queries are the last of a row of 16,384 tokens. Differences are relative to the largest
    entry; of top-k selection, the share of indices that differ. In float32 they may be what the
    package allows everywhere; in a shorter type, twice what the torch path in that type differs
    from itself in float64. ``name`` is that of kernels in the entry-point group, ``dtype`` that of
    activations.

    Raises:
        ValueError: If the kernels cannot run here.
    """
    given = {name: fields[name] for name in _SIZES if fields.get(name) is not None}
    sizes = DeepseekV4ContextParallelConfig(**given)  # AutoModel's defaults for the rest
    kernels: Kernels = plugins.load(plugins.KERNELS, name)(workspace_bytes=workspace_bytes)
    reference = TorchKernels(workspace_bytes=workspace_bytes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shard = _SHARD if device.type == "cuda" else _SHARD_ON_CPU
    layout = SequenceLayout(shard, _ROW // shard - 1, _ROW // shard)
    draw = _Draw(device, dtype)
    found: list[Difference] = []
    layers = sizes.num_hidden_layers
    for ratio in dict.fromkeys(int(each) for each in sizes.compress_ratios[:layers]):
        plan = AttentionPlan(Queries.own(layout), sizes.sliding_window, ratio)
        selected = None
        if ratio == OVERLAP_RATIO:
            no_turn = draw.integers(1, shard, sizes.qk_rope_head_dim)
            rope = torch.ones_like(no_turn), torch.zeros_like(no_turn)
            selected, mine = (
                selection(by, sizes, plan, rope, draw.integers)() for by in (reference, kernels)
            )
            share = (_by_place(mine) != _by_place(selected)).double().mean()
            found.append(Difference(f"ratio {ratio}: top-k selection", float(share), 0.0))

        def run(
            by: Kernels,
            *tensors: torch.Tensor,
            plan: AttentionPlan = plan,
            selected: torch.Tensor | None = selected,
        ) -> torch.Tensor:
            rope = draw.rope(layout, sizes.qk_rope_head_dim, tensors[0].dtype)
            return attend(by, sizes, plan, rope, selected, *tensors)

        names = ("output", "queries", "raw keys", "entries", "sinks")
        tensors = attention_tensors(sizes, plan, draw)
        found += _compare(f"ratio {ratio}: ", names, run, kernels, reference, tensors)

    def rotate(by: Kernels, keys: torch.Tensor) -> torch.Tensor:
        return by.rotate(keys, draw.rope(layout, sizes.qk_rope_head_dim, keys.dtype))

    keys = draw(1, shard, sizes.head_dim)
    return found + _compare("rotary: ", ("output", "keys"), rotate, kernels, reference, [keys])


class _Draw:
    """Draws tensors from one generator."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._device, self._dtype = device, dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, self._dtype)

    def integers(self, *shape: int) -> torch.Tensor:
        """Draw integers, the same each time, whose scores are exact and often tie."""
        generator = torch.Generator().manual_seed(1)
        numbers = torch.randint(-3, 4, shape, generator=generator)
        return numbers.to(self._device, self._dtype)

    def rope(self, layout: SequenceLayout, rotary: int, dtype: torch.dtype) -> Rope:
        """Return the angles of a shard, rounded to the dtype of activations."""
        positions = layout.positions(self._device).double()[:, None]
        angles = positions / 10000 ** torch.linspace(0, 1, rotary // 2, device=self._device)
        twice = angles.repeat(1, 2)[None]
        cos, sin = (part.to(self._dtype).to(dtype) for part in (twice.cos(), twice.sin()))
        return cos, sin


def _by_place(selected: torch.Tensor) -> torch.Tensor:
    """Sort each query's entries: they may come in any order."""
    last = torch.iinfo(selected.dtype).max
    return selected.masked_fill(selected == NOTHING, last).sort(-1).values


def _compare(
    prefix: str,
    names: tuple[str, ...],
    run: Run,
    kernels: Kernels,
    reference: Kernels,
    tensors: list[torch.Tensor],
) -> list[Difference]:
    """Compare the output and every gradient."""
    dtype = tensors[0].dtype
    exact = _with_gradients(run, reference, [tensor.double() for tensor in tensors])
    mine = _with_gradients(run, kernels, tensors)
    theirs = mine if dtype is torch.float32 else _with_gradients(run, reference, tensors)
    found = []
    for name, a, b, truth in zip(names, mine, theirs, exact, strict=True):
        if not truth.numel():
            continue
        largest = truth.abs().max().clamp(min=1e-30)
        value, rounding = (float((x.double() - truth).abs().max() / largest) for x in (a, b))
        limit = OUTPUT_LIMIT if name == "output" else GRADIENT_LIMIT
        if dtype is not torch.float32:
            limit = 2 * rounding + torch.finfo(dtype).eps
        what = name if name == "output" else f"gradient of {name}"
        found.append(Difference(prefix + what, value, limit))
    return found


def _with_gradients(run: Run, by: Kernels, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = run(by, *leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
