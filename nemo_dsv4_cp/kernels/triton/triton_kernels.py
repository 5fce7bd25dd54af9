# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as :class:`nemo_dsv4_cp.kernels.protocol.Kernels`."""

# B batch rows   L queries   N heads   D head_dim   T raw keys   P entries   K chosen entries
# I index heads   F index width

from __future__ import annotations

import functools
import logging

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor

from nemo_dsv4_cp.kernels.protocol import Rope
from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.kernels.triton.attention import attend
from nemo_dsv4_cp.kernels.triton.index_choice import choose_entries
from nemo_dsv4_cp.kernels.triton.norm_rotate import padded
from nemo_dsv4_cp.kernels.triton.rotary import rotate
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries

logger = logging.getLogger(__name__)

WIDEST = 512
"""The largest head dim whose tiles fit a multiprocessor."""

MANY_HEADS = 128
"""The most heads that the sums of chosen entries take at a time."""


INDEX_TILE = 64 * 128
"""The most numbers of one index query: they stay in shared memory beside a block of keys."""


class TritonKernels:
    """Kernels of this package, for CUDA devices of capability 8.0 and more."""

    def __init__(self, *, workspace_bytes: int) -> None:
        """Remember how much scratch an operation may take, on a device that can run kernels.

        Raises:
            ValueError: If there is no such device and Triton does not interpret.
        """
        _check_device()
        self.workspace_bytes = workspace_bytes
        self._torch = TorchKernels(workspace_bytes=workspace_bytes)

    def rotate(self, x_BLD: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Return keys or entries with their last r dims rotated."""
        return rotate(x_BLD, rope)

    def choose_entries(
        self,
        q_BLIF: torch.Tensor,
        weights_BLI: torch.Tensor,
        keys_BPF: torch.Tensor,
        rope: Rope,
        *,
        queries: Queries,
        ratio: int,
        topk: int,
    ) -> torch.Tensor:
        """Rotate index queries and return the ``topk`` best of the entries that each may see."""
        _check_dtype(q_BLIF)
        heads, width = q_BLIF.shape[2:]
        if padded(heads) * padded(width) > INDEX_TILE:
            _say_torch_chooses(heads, width)
            return self._torch.choose_entries(
                q_BLIF, weights_BLI, keys_BPF, rope, queries=queries, ratio=ratio, topk=topk
            )
        return choose_entries(
            q_BLIF, weights_BLI, keys_BPF, rope,
            queries=queries, ratio=ratio, topk=topk, workspace_bytes=self.workspace_bytes,
        )  # fmt: skip

    def attend(
        self,
        q_BLND: torch.Tensor,
        raw_BTD: torch.Tensor,
        entries_BPD: torch.Tensor,
        sinks_N: torch.Tensor,
        chosen_BLK: torch.Tensor | None,
        rope: Rope,
        *,
        plan: AttentionPlan,
        scale: float,
        eps: float,
        groups: int,
    ) -> torch.Tensor:
        """Attend to the window and to entries, all that are past or the chosen."""
        _check_dtype(q_BLND)
        heads, width = q_BLND.shape[2:]
        if width > WIDEST or (chosen_BLK is not None and heads > MANY_HEADS):
            _say_torch_attends(heads, width)
            return self._torch.attend(
                q_BLND, raw_BTD, entries_BPD, sinks_N, chosen_BLK, rope,
                plan=plan, scale=scale, eps=eps, groups=groups,
            )  # fmt: skip
        return attend(
            q_BLND, raw_BTD, entries_BPD, sinks_N, chosen_BLK, rope,
            plan=plan, scale=scale, eps=eps, groups=groups,
            workspace_bytes=self.workspace_bytes,
        )  # fmt: skip


def _check_device() -> None:
    if triton.knobs.runtime.interpret or isinstance(torch.empty(0), FakeTensor):
        return  # interpreted, or weighed
    if not torch.cuda.is_available():
        raise ValueError(
            "context_parallel.kernels='triton' needs a CUDA device, and torch sees none; set "
            "context_parallel.kernels: torch, or the environment variable TRITON_INTERPRET=1 to "
            "try the kernels, slowly, on a CPU"
        )
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise ValueError(
            f"context_parallel.kernels='triton' needs a CUDA device of capability 8.0 or more, and "
            f"this one has {capability[0]}.{capability[1]}; set context_parallel.kernels: torch"
        )


def _check_dtype(q: torch.Tensor) -> None:
    if q.dtype is torch.bfloat16 and triton.knobs.runtime.interpret:
        raise ValueError(
            "Triton's interpreter multiplies the bits of bfloat16 as whole numbers; under "
            "TRITON_INTERPRET=1 set torch_dtype: float32"
        )


@functools.cache
def _say_torch_chooses(heads: int, width: int) -> None:
    logger.info(
        "The index choice of %d heads of %d goes through torch: the Triton kernels take %d numbers "
        "a query.",
        heads,
        width,
        INDEX_TILE,
    )


@functools.cache
def _say_torch_attends(heads: int, width: int) -> None:
    logger.info(
        "Attention of %d heads of %d goes through torch: the Triton kernels take head dims up to "
        "%d, and %d heads where entries are chosen.",
        heads,
        width,
        WIDEST,
        MANY_HEADS,
    )
