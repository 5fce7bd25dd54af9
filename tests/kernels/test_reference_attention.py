# SPDX-License-Identifier: Apache-2.0
"""The torch path against AutoModel's plain reference of the same index contract."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemo_automodel.components.models.deepseek_v4.optimized_kernels import sparse_attention_torch

from nemo_dsv4_cp.automodel.tilelang import key_indices
from nemo_dsv4_cp.kernels.protocol import AttentionKeys, AttentionQueries
from nemo_dsv4_cp.kernels.reference import TorchKernels, workspace
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan, raw_tokens
from nemo_dsv4_cp.sequence.queries import Queries
from tests.kernels.cases import queries_of

OPTIONS = {"scale": 0.25, "workspace_bytes": 2 << 20}


def sparse_attention(q, raw, entries, sinks, selected, plan, *, scale, workspace_bytes):
    """Attend from rotated queries in chunks that take ``workspace_bytes``."""
    return TorchKernels(workspace_bytes=workspace_bytes).attend_rotated(
        AttentionQueries(q, None, plan, selected), AttentionKeys(raw, entries, sinks), scale
    )


def as_on_a_gpu(memory=1 << 30):
    """Let chunks have the lengths that they have on a GPU: several windows."""
    return mock.patch.object(workspace, "device_memory", lambda device: memory)


@st.composite
def cases(draw):
    """Draw queries, a rank's own or others, and their keys."""
    ratio = draw(st.sampled_from([0, 4, 8]))
    rows = draw(st.integers(1, 2))
    queries = queries_of(draw, rows)
    layout, count = queries.layout, len(queries)
    window = draw(st.integers(1, 20))
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    heads, width, entries = 3, 6, -(-layout.seq_len // ratio) if ratio else 0

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    selected = None
    if ratio == 4:
        scores = torch.rand(rows, count, entries, generator=generator)
        first, stop = (b[..., None] for b in layout.visible_entries(queries.positions(), ratio))
        places = torch.arange(entries)
        hidden = (places < first) | (places >= stop)
        selected = scores.masked_fill(hidden, -1).topk(min(5, entries)).indices
        selected = selected.masked_fill((selected < first) | (selected >= stop), -1).int()
    plan = AttentionPlan(queries, window, ratio)
    options = {
        "scale": width**-0.5,
        "workspace_bytes": draw(st.sampled_from([1, 4000, 30_000, 1 << 20])),
    }
    wanted = torch.tensor([t for run in raw_tokens(queries.runs, window) for t in run])
    raw = random(rows, len(wanted), width) * (wanted >= 0)[:, None]  # zeros before token 0
    tensors = [
        random(rows, count, heads, width),
        raw,
        random(rows, entries, width),
        random(heads),
    ]
    return plan, options, tensors, selected, random(rows, count, heads, width)


@settings(deadline=None)
@given(cases(), st.sampled_from([nullcontext, as_on_a_gpu]))
def test_outputs_and_gradients_are_those_of_the_plain_reference(case, device):
    plan, options, tensors, selected, weight = case
    mine = [t.clone().requires_grad_() for t in tensors]
    theirs = [t.clone().requires_grad_() for t in tensors]
    with device():
        out = sparse_attention(*mine, selected, plan, **options)
        (out * weight).sum().backward()
    q, raw, entries, sinks = theirs
    indices = key_indices(plan, AttentionKeys(raw, entries, sinks), selected).long()
    keys = torch.cat((raw, entries), 1)
    expected = sparse_attention_torch(q, keys, sinks, indices, options["scale"])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    (expected * weight).sum().backward()
    for gradient, reference in zip(mine, theirs, strict=True):
        if reference.grad is not None and reference.numel():
            torch.testing.assert_close(gradient.grad, reference.grad, atol=2e-5, rtol=1e-5)


def test_bfloat16_stays_close_to_float32():
    generator = torch.Generator().manual_seed(0)
    layout = SequenceLayout(256, 1, 2)
    plan = AttentionPlan(Queries.own(layout), 128, 128)
    shapes = [(1, 256, 4, 16), (1, 256 + 127, 16), (1, 4, 16), (4,)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    exact = [t.clone().requires_grad_() for t in tensors]
    rough = [t.bfloat16().requires_grad_() for t in tensors[:3]] + [
        tensors[3].clone().requires_grad_()
    ]
    sparse_attention(*exact, None, plan, **OPTIONS).sum().backward()
    out = sparse_attention(*rough, None, plan, **OPTIONS)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    for a, b in zip(rough, exact, strict=True):
        assert a.grad.dtype == a.dtype
        assert (a.grad - b.grad).abs().max() <= 0.03 * b.grad.abs().max()


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_no_tensor_grows_with_local_times_global_length(ratio):
    def largest(seq_len):
        cp_size = seq_len // 1024
        layout = SequenceLayout(1024, cp_size - 1, cp_size)
        plan = AttentionPlan(Queries.own(layout), 128, ratio)
        count = seq_len // ratio if ratio else 0
        selected = torch.zeros(1, 1024, 64, dtype=torch.int32) if ratio == 4 else None
        shapes = [(1, 1024, 2, 16), (1, 1024 + 127, 16), (1, count, 16), (2,)]
        tensors = [torch.randn(shape).requires_grad_() for shape in shapes]
        with as_on_a_gpu(), Largest() as seen:
            sparse_attention(*tensors, selected, plan, **OPTIONS).sum().backward()
        return seen.elements

    # What the chunk's workspace allows, or the keys themselves: never 1024 x seq_len.
    assert largest(16384) <= max(largest(2048), (1 << 20) // 4 * 2, 16384 // max(ratio, 1) * 16)


@pytest.mark.parametrize("memory", [79.2, 80])  # as CUDA reports an H100's, and as it is sold
def test_a_gpu_lends_gigabytes_and_a_cpu_what_fits_anywhere(memory):
    assert workspace.workspace_on(torch.device("cpu")) == 512 << 20
    with as_on_a_gpu(int(memory * (1 << 30))):
        assert workspace.workspace_on(torch.device("cuda")) == 2560 << 20
        assert TorchKernels(workspace_bytes=None)._workspace(torch.ones(1)) == 2560 << 20
        assert TorchKernels(workspace_bytes=1 << 20)._workspace(torch.ones(1)) == 1 << 20
