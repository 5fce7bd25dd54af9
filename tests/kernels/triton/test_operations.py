# SPDX-License-Identifier: Apache-2.0
"""The kernels as operations of torch: what counts, saves, fakes and compiles them sees them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

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
from tests.kernels.cases import attend, select_entries
from tests.kernels.triton.device import DEVICE, INTERPRETED

LENGTH, HEADS, WIDTH, WINDOW, RATIO, TOPK = 16, 4, 16, 3, 4, 2
OPERATIONS = {"dsv4_cp::rotate", "dsv4_cp::select_entries", "dsv4_cp::attend"}


def layer(q, keys, entries):
    """Rotate keys, select entries and attend: all operations, with gradients."""
    plan = AttentionPlan(Queries.own(SequenceLayout(LENGTH)), WINDOW, RATIO)
    kernels = TritonKernels(workspace_bytes=1 << 20)
    rope = (q.new_ones(1, LENGTH, 4), q.new_zeros(1, LENGTH, 4))
    of_keys = (q.new_ones(1, keys.shape[1], 4), q.new_zeros(1, keys.shape[1], 4))
    with torch.no_grad():
        weights = q.new_ones(1, LENGTH, HEADS)
        selected = select_entries(kernels, q.clone(), weights, entries, rope, plan=plan, topk=TOPK)
    return attend(
        kernels, q, kernels.rotate(keys, of_keys), entries, q.new_zeros(HEADS), selected, rope,
        plan=plan, scale=0.25, eps=1e-6, groups=2,
    )  # fmt: skip


def inputs():
    shapes = [
        (1, LENGTH, HEADS, WIDTH),
        (1, LENGTH + WINDOW - 1, WIDTH),
        (1, LENGTH // RATIO, WIDTH),
    ]
    return [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]


def test_flops_are_those_of_the_products():
    with FlopCounterMode(display=False) as counted:
        layer(*inputs()).sum().backward()
    counts = {str(name): count for name, count in counted.get_flop_counts()["Global"].items()}
    seen = [(i + 1) // RATIO for i in range(LENGTH)]
    product = 2 * HEADS * WIDTH * (LENGTH * WINDOW + min(sum(seen), LENGTH * TOPK))
    assert counts["dsv4_cp.attend"] == 2 * product
    assert counts["dsv4_cp.attend_backward"] == 5 * product
    assert counts["dsv4_cp.select_entries"] == 2 * HEADS * WIDTH * sum(seen)


def test_fake_tensors_take_the_shapes_and_dtypes_of_real_ones():
    real = inputs()
    out = layer(*real)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in real]
        fake = layer(*fakes)
        gradients = torch.autograd.grad(fake.sum(), fakes)
    assert (fake.shape, fake.dtype, fake.stride()) == (out.shape, out.dtype, out.stride())
    assert [g.shape for g in gradients] == [x.shape for x in real]


def loss(q, keys, entries, *, full):
    """Compare index scores of ``q`` and ``entries`` with attention of the same tensors."""
    plan = AttentionPlan(Queries.own(SequenceLayout(LENGTH)), WINDOW, RATIO)
    rope = (q.new_ones(1, LENGTH, 4), q.new_zeros(1, LENGTH, 4))
    weights = q.new_ones(1, LENGTH, HEADS)
    kernels = TritonKernels(workspace_bytes=1 << 20)
    selected = select_entries(kernels, q.clone(), weights, entries, rope, plan=plan, topk=TOPK)
    return kernels.indexer_loss(
        IndexQueries(q, weights, rope, plan),
        entries,
        AttentionQueries(q, rope, plan, selected),
        AttentionKeys(keys, entries, q.new_zeros(HEADS)),
        AttentionConstants(0.25, 1e-6, 2),
        token_weights_BL=q.new_ones(1, LENGTH),
        full=full,
    )


@pytest.mark.parametrize("full", [False, True])
def test_the_indexers_loss_counts_its_products_and_takes_fake_tensors(full):
    real = [each.detach() for each in inputs()]
    with FlopCounterMode(display=False) as counted:
        terms = loss(*real, full=full)
    counts = {str(name): count for name, count in counted.get_flop_counts()["Global"].items()}
    seen = sum((i + 1) // RATIO for i in range(LENGTH))
    compared = seen if full else min(seen, LENGTH * TOPK)
    products = LENGTH * WINDOW + (2 + 5) * compared
    assert counts["dsv4_cp.indexer_loss"] == 2 * HEADS * WIDTH * products
    with FakeTensorMode() as mode:
        fake = loss(*(mode.from_tensor(each) for each in real), full=full)
    for mine, theirs in zip(vars(fake).values(), vars(terms).values(), strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (
            theirs.shape, theirs.dtype, theirs.stride()
        )  # fmt: skip


def test_selective_checkpointing_may_save_each_operation():
    asked = set()

    def policy(context, operation, *args, **kwargs):
        asked.add(operation.name())
        saved = operation.name() == "dsv4_cp::attend"
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    given, again = inputs(), None
    expected = torch.autograd.grad(layer(*given).square().sum(), given)
    out = checkpoint(
        layer,
        *given,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    again = torch.autograd.grad(out.square().sum(), given)
    assert asked >= OPERATIONS
    for mine, theirs in zip(again, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("ratio", [0, 4, 128] if MANY else [4])
def test_a_layer_of_one_rank_compiles_without_a_break(ratio):
    pytest.importorskip("nemo_automodel", reason="the kernels run where AutoModel is not installed")
    from nemo_dsv4_cp.bench.layer import Case, build
    from nemo_dsv4_cp.bench.timing import CPU_SIZES

    case = Case("boundary", ratio, 256, 1, 0, kernels="triton")
    forward = build(case, None, dtype=torch.float32, device=DEVICE, **CPU_SIZES)
    torch._dynamo.reset()
    with torch.compiler.set_stance("default"):
        explained = torch._dynamo.explain(forward)()
    assert explained.graph_break_count == 0, explained.break_reasons
    seen = {node.target for graph in explained.graphs for node in graph.graph.nodes}
    assert torch.ops.dsv4_cp.attend.default in seen


def errors(run, exact, given):
    """Return the largest error of the output and of each gradient, over the largest entry."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = run(*leaves)
    found = [out, *torch.autograd.grad(out.float().square().sum(), leaves)]
    return [
        ((a.double() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(found, exact, strict=True)
    ]


@pytest.mark.skipif(not INTERPRETED, reason="a GPU sums in an order of its own")
@pytest.mark.parametrize("width", [64, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_the_torch_path(dtype, width, bfloat16_products):
    generator = torch.Generator().manual_seed(0)
    length, ratio = 12, 4
    queries = Queries.own(SequenceLayout(length, 1, 2))
    shapes = [(1, length, 3, width), (1, length + 4, width), (1, 6, width), (3,)]
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    angles = torch.randn(1, length, 8, generator=generator).repeat(1, 1, 2)
    selected = torch.tensor([0, 2, -1], dtype=torch.int32).expand(1, length, -1)
    options = {
        "plan": AttentionPlan(queries, 5, ratio), "scale": width**-0.5, "eps": 1e-6, "groups": 3
    }  # fmt: skip

    def by(kernels, dtype):
        rope = (angles.cos().to(dtype), angles.sin().to(dtype))
        return lambda *leaves: attend(kernels, *leaves, selected, rope, **options)

    torch_path = TorchKernels(workspace_bytes=1 << 20)
    leaves = [x.double().requires_grad_() for x in given]
    rounded = tuple(part.to(dtype).double() for part in (angles.cos(), angles.sin()))
    out = attend(torch_path, *leaves, selected, rounded, **options)
    exact = [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
    mine = errors(by(TritonKernels(workspace_bytes=1 << 20), dtype), exact, given)
    theirs = errors(by(torch_path, dtype), exact, given)
    for a, b in zip(mine, theirs, strict=True):
        assert a <= 1.5 * b + 2 * torch.finfo(dtype).eps
