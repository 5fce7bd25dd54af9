# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as :class:`nemo_dsv4_cp.kernels.protocol.Kernels`."""

# B batch rows   L queries   D head_dim   P entries   F index width

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor

from nemo_dsv4_cp.kernels.protocol import (
    AttentionConstants,
    AttentionKeys,
    AttentionQueries,
    CandidateBlocks,
    IndexerLossTerms,
    IndexQueries,
    Rope,
    RotatedIndexQueries,
)
from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.kernels.triton import tiles
from nemo_dsv4_cp.kernels.triton.attention import AttendAdding, attend_op
from nemo_dsv4_cp.kernels.triton.chunks import backward_chunks, loss_chunks, score_chunks
from nemo_dsv4_cp.kernels.triton.indexer_loss import indexer_loss_op, target_parts
from nemo_dsv4_cp.kernels.triton.norm_rotate import rotate_op
from nemo_dsv4_cp.kernels.triton.selection import select_entries_op
from nemo_dsv4_cp.kernels.triton.shared_selection import SharedSelection, select_shared_op

logger = logging.getLogger(__name__)

WIDEST = 512
"""The largest head dim whose tiles fit a multiprocessor."""

MANY_HEADS = 128
"""The most heads that the sums of selected entries take at a time."""

INDEX_TILE = 64 * 128
"""The most numbers of one index query: they stay in shared memory beside a block of keys."""


class TritonKernels(TorchKernels):
    """Kernels of this package, for CUDA devices of capability 8.0 and more.

    Sizes that do not fit a multiprocessor go through the torch path.
    """

    def __init__(self, *, workspace_bytes: int | None) -> None:
        """Remember how much scratch an operation may take, on a device that can run kernels.

        Raises:
            ValueError: If there is no such device and Triton does not interpret.
        """
        _check_device()
        super().__init__(workspace_bytes=workspace_bytes)
        self.multiprocessors = _multiprocessors()

    # Each operation makes few calls, for every layer runs it in every forward. What all layers of a
    # step share is made once, under a key that holds all that it depends on.

    def rotate(self, x_BLD: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Return keys or entries with their last r dims rotated."""
        (cos, sin), batch = rope, x_BLD.shape[0]
        cos, sin = cos.expand(batch, -1, -1).contiguous(), sin.expand(batch, -1, -1).contiguous()
        rotated: torch.Tensor = rotate_op(x_BLD, cos, sin, 1.0)
        return rotated

    def select_entries(
        self, queries: IndexQueries, keys_BPF: torch.Tensor, *, topk: int
    ) -> torch.Tensor:
        """Rotate index queries and return the ``topk`` best entries of each, in order of place."""
        q, (cos, sin), plan = queries.q_BLIF, queries.rope, queries.plan
        batch = q.shape[0]
        if not _selects(q):
            return super().select_entries(queries, keys_BPF, topk=topk)
        workspace_bytes = self.workspace_bytes
        visible, chunks = plan.queries.once(
            ("top-k selection", plan.ratio, batch, workspace_bytes, q.device),
            lambda: (
                plan.queries.visible_entries(plan.ratio, q.device),
                score_chunks(plan, batch=batch, workspace_bytes=workspace_bytes),
            ),
        )
        selected: torch.Tensor = select_entries_op(
            q.contiguous(),
            queries.weights_BLI.float().contiguous(),
            keys_BPF.contiguous(),
            cos.expand(batch, -1, -1).contiguous(),
            sin.expand(batch, -1, -1).contiguous(),
            torch.stack(visible, dim=-1).to(torch.int32),
            topk,
            chunks,
        )
        return selected

    def select_shared(
        self,
        queries: RotatedIndexQueries,
        keys_BPF: torch.Tensor,
        *,
        topk: int,
        blocks: CandidateBlocks | None,
        candidates_BLM: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the ``topk`` best entries of each query, and candidates if due, by place."""
        q, plan, batch = queries.q_BLIF, queries.plan, len(queries.q_BLIF)
        if not _selects(q):
            return super().select_shared(
                queries, keys_BPF, topk=topk, blocks=blocks, candidates_BLM=candidates_BLM
            )
        inside = candidates_BLM is not None
        shared = SharedSelection.of(
            plan,
            blocks,
            inside=inside,
            entries=keys_BPF.shape[1],
            batch=batch,
            workspace_bytes=self.workspace_bytes,
            device=q.device,
        )
        selected, made = select_shared_op(
            q.contiguous(),
            queries.weights_BLI.contiguous(),
            keys_BPF.contiguous(),
            candidates_BLM.contiguous() if candidates_BLM is not None and shared.keep else None,
            shared.visible,
            shared.bounds,
            topk,
            0 if inside else shared.keep,
            shared.size,
            shared.chunks,
        )
        if blocks is None or inside:
            return selected, None
        return selected, made if shared.keep else shared.every_block(batch)

    def attend(
        self, queries: AttentionQueries, keys: AttentionKeys, constants: AttentionConstants
    ) -> torch.Tensor:
        """Attend to the window and to entries, all in range or the selected."""
        q, (cos, sin), plan = queries.q_BLND, queries.rope, queries.plan
        selected = queries.selected_BLK
        batch, _, heads, width = q.shape
        if width > WIDEST or (selected is not None and heads > MANY_HEADS):
            _report_torch_attends(heads, width)
            return super().attend(queries, keys, constants)
        sizes: dict[str, Any] = {
            "batch": batch,
            "heads": heads,
            "width": width,
            "n_selected": None if selected is None else selected.shape[-1],
            "itemsize": q.element_size(),
            "in_order": torch.are_deterministic_algorithms_enabled(),
            "workspace_bytes": self.workspace_bytes,
            "multiprocessors": self.multiprocessors,
        }
        ranges, chunks = plan.queries.once(
            ("attention", plan.window, plan.ratio, q.device, *sizes.values()),
            lambda: (plan.visible_ranges(q.device), backward_chunks(plan, **sizes)),
        )
        attend: Callable[..., tuple[torch.Tensor, torch.Tensor]] = attend_op
        if keys.entries_grad is not None:
            attend = functools.partial(_attend_adding, keys.entries_grad)
        out, _ = attend(
            q,
            keys.raw_BTD.contiguous(),
            keys.entries_BPD.contiguous(),
            keys.sinks_N,
            None if selected is None else selected.contiguous(),
            cos.expand(batch, -1, -1).contiguous(),
            sin.expand(batch, -1, -1).contiguous(),
            ranges,
            chunks,
            plan.window,
            constants.scale,
            constants.eps,
            constants.groups,
        )
        return out

    def indexer_loss(
        self,
        index: IndexQueries,
        index_keys_BPF: torch.Tensor,
        queries: AttentionQueries,
        keys: AttentionKeys,
        constants: AttentionConstants,
        *,
        token_weights_BL: torch.Tensor,
        full: bool,
    ) -> IndexerLossTerms:
        """Compare what the indexer would choose with what attention looks at."""
        q, x, plan, selected = index.q_BLIF, queries.q_BLND, queries.plan, queries.selected_BLK
        batch, _, index_heads, index_width = q.shape
        assert selected is not None
        if constants.eps is None or x.shape[-1] > WIDEST or not _selects(q):
            return super().indexer_loss(
                index, index_keys_BPF, queries, keys, constants,
                token_weights_BL=token_weights_BL, full=full,
            )  # fmt: skip
        sizes: dict[str, Any] = {
            "batch": batch,
            "parts": target_parts(x),
            "query_bytes": index_heads * index_width * q.element_size(),
            "width": index_width,
            "n_selected": None if full else selected.shape[-1],
            "in_order": not full and torch.are_deterministic_algorithms_enabled(),
            "workspace_bytes": self.workspace_bytes,
        }
        ranges, chunks = plan.queries.once(
            ("indexer loss", plan.window, plan.ratio, q.device, *sizes.values()),
            lambda: (plan.visible_ranges(q.device), loss_chunks(plan, **sizes)),
        )
        sums, *grads = indexer_loss_op(
            q.contiguous(),
            index.weights_BLI.float().contiguous(),
            index_keys_BPF.contiguous(),
            *(part.expand(batch, -1, -1).contiguous() for part in index.rope),
            token_weights_BL.contiguous(),
            x.contiguous(),
            keys.raw_BTD.contiguous(),
            keys.entries_BPD.contiguous(),
            keys.sinks_N,
            selected.contiguous(),
            *(part.expand(batch, -1, -1).contiguous() for part in queries.rope),
            ranges,
            chunks,
            plan.window,
            constants.scale,
            constants.eps,
            full,
            sizes["in_order"],
        )
        return IndexerLossTerms(*sums.unbind(), *grads)


# The sum is no tensor that a graph could pass.
_attend_adding = torch.compiler.disable(AttendAdding.apply)


def _selects(q_BLIF: torch.Tensor) -> bool:
    """Return whether the kernels take index queries of these sizes, and log it if not."""
    heads, width = q_BLIF.shape[2:]
    padded = triton.next_power_of_2(max(heads, 16)) * triton.next_power_of_2(max(width, 16))
    if padded > INDEX_TILE:
        _report_torch_selects(heads, width)
    return bool(padded <= INDEX_TILE)


def _check_device() -> None:
    if triton.knobs.runtime.interpret or tiles.compiling_ahead():
        return
    if isinstance(torch.empty(0), FakeTensor):
        return  # profiled
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
    if capability == (10, 3) and tiles.TRITON < (3, 6):
        raise ValueError(
            f"context_parallel.kernels='triton': triton {triton.__version__} does not compile for "
            f"capability 10.3, of {torch.cuda.get_device_name()}; install triton 3.6 or newer, or "
            "set context_parallel.kernels: torch"
        )
    shared = _shared_memory()
    if shared < tiles.SHARED_MEMORY:
        raise ValueError(
            f"context_parallel.kernels='triton' needs {tiles.SHARED_MEMORY >> 10} KiB of shared "
            f"memory per block, and {torch.cuda.get_device_name()} has {shared >> 10}; set "
            "context_parallel.kernels: torch"
        )


def _multiprocessors() -> int:
    """Return how many the current CUDA device has, an H100's number without one."""
    if not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


def _shared_memory() -> int:
    """Return the most bytes that a block of the current CUDA device may have."""
    properties = triton.runtime.driver.active.utils.get_device_properties
    return int(properties(torch.cuda.current_device())["max_shared_mem"])


@functools.cache
def _report_torch_selects(heads: int, width: int) -> None:
    logger.info(
        "Top-k selection with %d heads of %d goes through torch: the Triton kernels take %d "
        "numbers per query.",
        heads,
        width,
        INDEX_TILE,
    )


@functools.cache
def _report_torch_attends(heads: int, width: int) -> None:
    logger.info(
        "Attention of %d heads of %d goes through torch: the Triton kernels take head dims up to "
        "%d, and %d heads with top-k indices.",
        heads,
        width,
        WIDEST,
        MANY_HEADS,
    )
