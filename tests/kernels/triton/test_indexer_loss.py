# SPDX-License-Identifier: Apache-2.0
"""The indexer's loss and its gradients against the torch path, sizes drawn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dsv4_cp.kernels.protocol import (
    AttentionConstants,
    AttentionKeys,
    AttentionQueries,
    IndexQueries,
)
from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.kernels.triton import TritonKernels
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries
from tests.examples import MANY
from tests.kernels.cases import queries_of
from tests.kernels.triton.device import DEVICE, INTERPRETED
from tests.kernels.triton.test_attention import random, selection

pytestmark = pytest.mark.usefixtures("checked_memory")
WORKSPACES = [1, 20_000, 1 << 20]
NAMES = ("loss", "captured", "grad_q_BLIF", "grad_weights_BLI", "grad_keys_BPF")


@st.composite
def cases(draw):
    """Draw a rank's queries and all that the loss reads of them; few values, so that dots tie."""
    batch = draw(st.integers(1, 2))
    queries, ratio = queries_of(draw, batch), draw(st.sampled_from([1, 2, 4]))
    plan = AttentionPlan(queries, draw(st.integers(1, 20)), ratio)
    heads, width = draw(st.sampled_from([1, 3, 20])), draw(st.sampled_from([16, 24]))
    index_heads, index_width = draw(st.sampled_from([1, 5, 20])), draw(st.sampled_from([8, 40]))
    length, entries = len(queries), -(-queries.layout.seq_len // ratio)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    selected = selection(draw, queries, ratio, batch, entries, generator)
    index_keys = random(generator, batch, entries, index_width)
    tensors = [
        random(generator, batch, length, index_heads, index_width),
        random(generator, batch, length, index_heads),
        index_keys.round() if draw(st.booleans()) else index_keys,
        random(generator, batch, length, heads, width),
        random(generator, batch, length + len(queries.runs) * (plan.window - 1), width),
        random(generator, batch, entries, width),
        random(generator, heads),
        torch.rand(batch, length, generator=generator) - 0.2,
    ]
    tensors[-1].clamp_(min=0)  # padding
    angles = random(generator, batch, length, draw(st.sampled_from([1, 4]))).repeat(1, 1, 2)
    rope = angles.cos(), angles.sin()
    return tensors, selected, rope, plan, draw(st.sampled_from(WORKSPACES))


def terms(kernels, tensors, selected, rope, plan, *, full):
    q, weights, keys, x, raw, entries, sinks, token_weights = (each.to(DEVICE) for each in tensors)
    rope = tuple(part.to(DEVICE) for part in rope)
    found = kernels.indexer_loss(
        IndexQueries(q, weights, rope, plan),
        keys,
        AttentionQueries(x, rope, plan, selected.to(DEVICE)),
        AttentionKeys(raw, entries, sinks),
        AttentionConstants(x.shape[-1] ** -0.5, 1e-6, 1),
        token_weights_BL=token_weights,
        full=full,
    )
    return {name: getattr(found, name) for name in NAMES}


def assert_same(mine, theirs):
    for name, b in theirs.items():
        a, tolerance = mine[name], 5e-5 if name.startswith("grad") else 1e-5
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        largest = b.abs().max().item() if b.numel() else 0
        error = (a - b).abs().max().item() if b.numel() else 0
        assert error <= tolerance * max(largest, 1e-2), f"{name}: {error:.2e} of {largest:.2e}"


@given(cases(), st.booleans())
def test_loss_and_gradients_are_the_torch_paths(case, full):
    *given, workspace = case
    expected = terms(TorchKernels(workspace_bytes=1 << 20), *given, full=full)
    assert_same(terms(TritonKernels(workspace_bytes=workspace), *given, full=full), expected)


@settings(max_examples=300 if MANY else 3)
@given(case=cases())
def test_the_deterministic_path_sums_the_same(case):
    *given, workspace = case
    expected = terms(TorchKernels(workspace_bytes=1 << 20), *given, full=False)
    kernels = TritonKernels(workspace_bytes=workspace)
    torch.use_deterministic_algorithms(True)
    try:
        mine, again = (terms(kernels, *given, full=False) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(mine, expected)
    assert all(torch.equal(mine[name], again[name]) for name in NAMES)


@pytest.mark.parametrize("which", ["index queries", "index keys", "queries", "entries"])
def test_what_is_not_finite_is_not_swallowed(which):
    tensors, *others = tiny(torch.float32)
    place = {"index queries": 0, "index keys": 2, "queries": 3, "entries": 5}[which]
    tensors[place][:, 1] = torch.nan
    kernels = TritonKernels(workspace_bytes=1 << 20)
    for full in (False, True):
        assert terms(kernels, tensors, *others, full=full)["loss"].isnan()


@pytest.mark.parametrize("sink", [95.0, 300.0])  # p is a subnormal number, and 0
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kernels", [TorchKernels, TritonKernels])
def test_queries_whose_sink_has_all_probability_have_no_loss(kernels, full, sink):
    tensors, *others = tiny(torch.float32)
    tensors[6].fill_(sink)
    found = terms(kernels(workspace_bytes=1 << 20), tensors, *others, full=full)
    assert found["loss"] == 0
    assert not any(found[name].any() for name in NAMES[2:])


def tiny(dtype):
    """Return four queries of a third rank, which see 2 or 3 entries and select two."""
    plan = AttentionPlan(Queries.own(SequenceLayout(4, 2, 3)), 5, 4)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 3, 64), (1, 4, 3), (1, 3, 64), (1, 4, 3, 64), (1, 8, 64), (1, 3, 64), (3,)]
    tensors = [random(generator, *shape).to(dtype) for shape in shapes]
    tensors[1] = tensors[1].float() / 8
    angles = random(generator, 1, 4, 8).repeat(1, 1, 2)
    selected = torch.tensor([0, 1, -1], dtype=torch.int32).expand(1, 4, -1)
    rope = angles.cos().to(dtype), angles.sin().to(dtype)
    return [*tensors, torch.full((1, 4), 1 / 4)], selected, rope, plan


def errors(mine, exact):
    """Return the largest error of each term over its largest number."""
    return [
        ((mine[name].float() - exact[name]).abs().max() / exact[name].abs().max()).item()
        for name in NAMES
    ]


@pytest.mark.skipif(not INTERPRETED, reason="a GPU sums in an order of its own")
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_the_torch_path(dtype, full, bfloat16_products):
    tensors, selected, rope, plan = tiny(dtype)
    torch_path = TorchKernels(workspace_bytes=1 << 20)
    wide = [each.float() for each in tensors], selected, tuple(each.float() for each in rope), plan
    exact = terms(torch_path, *wide, full=full)
    mine, theirs = (
        errors(terms(kernels, tensors, selected, rope, plan, full=full), exact)
        for kernels in (TritonKernels(workspace_bytes=1 << 20), torch_path)
    )
    for a, b in zip(mine, theirs, strict=True):
        assert a <= 1.5 * b + 2 * torch.finfo(dtype).eps
