# SPDX-License-Identifier: Apache-2.0
"""The attention kernels against the torch path, every gradient, sizes drawn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dsv4_cp.kernels.protocol import (
    AttentionConstants,
    AttentionKeys,
    AttentionQueries,
)
from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.kernels.triton import TritonKernels, chunks
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries
from tests.examples import MANY
from tests.kernels.cases import attend, queries_of
from tests.kernels.triton.device import DEVICE

pytestmark = pytest.mark.usefixtures("checked_memory")
WORKSPACES = [1, 60_000, 1 << 20]


def random(generator, *shape):
    return torch.randn(*shape, generator=generator)


@st.composite
def cases(draw):
    batch = draw(st.integers(1, 3))
    queries = queries_of(draw, batch)
    layout, length = queries.layout, len(queries)
    ratio = draw(st.sampled_from([0, 1, 2, 4]))
    window = draw(st.integers(1, 20))
    plan = AttentionPlan(queries, window, ratio)
    heads, width = draw(st.integers(1, 20)), draw(st.sampled_from([16, 24, 64]))
    rotary = draw(st.sampled_from([2, 8, width]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    entries = -(-layout.seq_len // ratio) if ratio else 0
    selected = None
    if ratio and draw(st.booleans()):
        selected = selection(draw, queries, ratio, batch, entries, generator)
    angles = random(generator, batch, length, rotary // 2).repeat(1, 1, 2)
    tensors = [
        random(generator, batch, length, heads, width),
        random(generator, batch, length + len(queries.runs) * (window - 1), width),
        random(generator, batch, entries, width),
        random(generator, heads),
    ]
    groups = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    eps = draw(st.sampled_from([1e-6, 1e-6, None]))  # V4.1 has no norm
    options = {"plan": plan, "scale": width**-0.5, "eps": eps, "groups": groups}
    return (
        tensors,
        selected,
        (angles.cos(), angles.sin()),
        options,
        draw(st.sampled_from(WORKSPACES)),
    )


def selection(draw, queries, ratio, batch, entries, generator):
    """Draw some of the entries that each query may see, the unused slots last."""
    kept = draw(st.integers(0, entries))
    first, stop = queries.layout.visible_entries(queries.positions(), ratio)
    scores = torch.rand(batch, len(queries), entries, generator=generator)
    place = torch.arange(entries)
    scores = scores.masked_fill((place < first[..., None]) | (place >= stop[..., None]), -1)
    best = scores.topk(kept, dim=-1)
    return best.indices.masked_fill(best.values < 0, NOTHING).to(torch.int32)


def with_gradients(kernels, tensors, selected, rope, weight=None, **options):
    leaves = [tensor.to(DEVICE).clone().requires_grad_() for tensor in tensors]
    rope = tuple(part.to(DEVICE) for part in rope)
    selected = None if selected is None else selected.to(DEVICE)
    out = attend(kernels, leaves[0] * 1, *leaves[1:], selected, rope, **options)
    # The output projection gives gradients of [G, B L, D N / G].
    batch, length, groups, columns = out.shape
    weight = random(torch.Generator().manual_seed(7), groups, batch, length, columns)
    (out * weight.to(DEVICE).permute(1, 2, 0, 3)).sum().backward()
    return [out.detach(), *[leaf.grad for leaf in leaves]]


def assert_same(mine, theirs, tolerances=(1e-5, 5e-5)):
    for name, a, b in zip(("out", "q", "raw", "entries", "sinks"), mine, theirs, strict=True):
        largest = b.abs().max().item() if b.numel() else 0
        allowed = tolerances[name != "out"] * max(largest, 1e-2)  # a sum of ones may cancel
        error = (a - b).abs().max().item() if b.numel() else 0
        assert error <= allowed, f"{name}: {error:.2e} of {allowed:.2e}"


@given(cases())
def test_output_and_gradients_are_the_torch_paths(case):
    tensors, selected, rope, options, workspace = case
    theirs = TorchKernels(workspace_bytes=1 << 20)
    kernels = TritonKernels(workspace_bytes=workspace)
    mine = with_gradients(kernels, tensors, selected, rope, **options)
    assert_same(mine, with_gradients(theirs, tensors, selected, rope, **options))


@settings(max_examples=300 if MANY else 3)  # each runs three times
@given(case=cases())
def test_the_deterministic_path_sums_the_same(case):
    tensors, selected, rope, options, workspace = case
    theirs = TorchKernels(workspace_bytes=1 << 20)
    expected = with_gradients(theirs, tensors, selected, rope, **options)
    kernels = TritonKernels(workspace_bytes=workspace)
    torch.use_deterministic_algorithms(True)
    try:
        mine, again = (
            with_gradients(kernels, tensors, selected, rope, **options) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(mine, expected)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))


def test_entries_summed_in_parts_have_the_torch_paths_gradient_to_the_same_bits(monkeypatch):
    # Queries of two documents see two blocks of entries, each in five parts.
    monkeypatch.setattr(chunks, "_QUERIES_PER_PART", 2)
    starts = torch.tensor([[0, 75], [0, 80]])
    layout = SequenceLayout.of_documents(starts, 10, cp_rank=7, cp_size=8)
    plan = AttentionPlan(Queries.own(layout), 3, 1)
    generator = torch.Generator().manual_seed(0)
    tensors = [random(generator, *shape) for shape in [(2, 10, 3, 16), (2, 12, 16), (2, 80, 16)]]
    tensors.append(random(generator, 3))
    angles = random(generator, 2, 10, 2).repeat(1, 1, 2)
    options = {"plan": plan, "scale": 0.25, "eps": 1e-6, "groups": 1}
    expected, mine, again = (
        with_gradients(kernels, tensors, None, (angles.cos(), angles.sin()), **options)
        for kernels in (
            TorchKernels(workspace_bytes=1 << 20),
            *(TritonKernels(workspace_bytes=1 << 20) for _ in range(2)),
        )
    )
    assert_same(mine, expected)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))


@pytest.mark.parametrize("which", ["q", "raw", "entries"])
def test_what_is_not_finite_is_not_swallowed(which):
    queries = Queries.own(SequenceLayout(12, 1, 2))
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 12, 2, 16), "raw": (1, 12 + 3, 16), "entries": (1, 6, 16)}
    tensors = {name: random(generator, *shape).to(DEVICE) for name, shape in shapes.items()}
    tensors[which][:, 4] = torch.nan
    rope = (torch.ones(1, 12, 4, device=DEVICE), torch.zeros(1, 12, 4, device=DEVICE))
    options = {"plan": AttentionPlan(queries, 4, 4), "scale": 0.25, "eps": 1e-6, "groups": 1}
    sinks = torch.zeros(2, device=DEVICE)
    kernels = TritonKernels(workspace_bytes=1 << 20)
    out = attend(kernels, *tensors.values(), sinks, None, rope, **options)
    lost = out.isnan().any(-1).flatten().tolist()
    # Entry 4 is seen from position 19 on, the queries being those of 12 to 23.
    first, last = {"q": (4, 5), "raw": (1, 5), "entries": (7, 12)}[which]
    assert all(lost[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_of_entries_is_added_to_a_sum_that_layers_share(dtype):
    plan = AttentionPlan(Queries.own(SequenceLayout(32, 1, 2)), 5, 2)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 32, 4, 16), (1, 36, 16), (1, 32, 16), (4,)]
    tensors = [random(generator, *shape).to(DEVICE, dtype) for shape in shapes]
    selected = torch.arange(8, device=DEVICE).expand(1, 32, 8).to(torch.int32)
    rope = torch.ones(1, 32, 4, device=DEVICE), torch.zeros(1, 32, 4, device=DEVICE)
    kernels = TritonKernels(workspace_bytes=1 << 20)

    def gradients(entries_grad):
        q, raw, entries, sinks = leaves = [x.clone().requires_grad_() for x in tensors]
        out = kernels.attend(
            AttentionQueries(q * 1, rope, plan, selected),
            AttentionKeys(raw, entries, sinks, entries_grad),
            AttentionConstants(0.25, None, 2),
        )
        return torch.autograd.grad(out.float().square().sum(), leaves, allow_unused=True)

    total = torch.ones(shapes[2], device=DEVICE)
    alone, added = gradients(None), gradients(lambda: total)
    assert added[2] is None
    torch.testing.assert_close((total - 1).to(dtype), alone[2], rtol=1e-3, atol=1e-3)
    for place in (0, 1, 3):
        assert torch.equal(alone[place], added[place])
