# SPDX-License-Identifier: Apache-2.0
"""The indexer's loss of layers over real gloo ranks, against a dense one in float64."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from nemo_automodel.components.distributed.activation_checkpointing import (
    make_selective_checkpoint_context_fn,
)
from nemo_automodel.components.models.deepseek_v4.layers import DeepseekV4RotaryEmbedding
from nemo_automodel.components.moe.megatron.moe_utils import MoEAuxLossAutoScaler
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from nemo_dsv4_cp.attention import ContextParallelAttention
from nemo_dsv4_cp.attention.indexer_loss import token_weights
from nemo_dsv4_cp.attention.step import STEP_KEY, StepContext
from nemo_dsv4_cp.checks.difference import GRADIENT_LIMIT, OUTPUT_LIMIT, Difference
from nemo_dsv4_cp.exchange import collectives
from nemo_dsv4_cp.exchange.collectives import all_reduce_sum, cp_rank, cp_size
from nemo_dsv4_cp.sequence.layout import SequenceLayout, local_seq_multiple, padded_seq_len
from tests.examples import examples
from tests.indexer_loss import INDEXER, indexer_loss
from tests.packed_parity import starts_of
from tests.parity import assert_parity, cpu_backend, randomise, tiny_config, worst

THETA = 160000.0
COEFFICIENT, SCALE = 0.5, 0.25
UNDECIDED = 1e-6
"""Below this margin float32 may select other entries, or see the other side of relu."""
SMALLEST = 1e-6
"""Gradients whose largest entry is less are sums that cancel: of queries with one entry."""


@dataclass(frozen=True)
class Case:
    """A layer, what it is given, and how it is run.

    Attributes:
        documents: Lengths of each row's documents; one per row unless packed.
        spare: Tokens of padding more than shards need, per rank.
        recompute: "", "full" or "selective": activation checkpointing.
        alone: Whether nothing but the indexer trains.
        compiled: Whether torch.compile traces the layer.
    """

    documents: list[list[int]]
    packed: bool = False
    full: bool = False
    transport: str = "boundary"
    balance: str = "off"
    overlap: bool = True
    keep: bool = True
    recompute: str = ""
    alone: bool = False
    compiled: bool = False
    spare: int = 0
    window: int = 16
    topk: int = 5
    workspace_mib: int = 1
    seed: int = 0

    def options(self, coefficient):
        mode = "full" if self.full else "sparse"
        return {
            "transport": self.transport,
            "balance": self.balance,
            "overlap": self.overlap,
            "keep_index_choice": self.keep,
            "workspace_mib": self.workspace_mib,
            "indexer_loss": {"coefficient": coefficient, "mode": mode},
        }

    def layout(self, rank, size):
        longest = max(map(sum, self.documents))
        if self.packed:
            local_len = -(-longest // size) + self.spare
            starts = starts_of(self.documents, local_len * size)
            return SequenceLayout.of_documents(starts, local_len, cp_rank=rank, cp_size=size)
        multiple = local_seq_multiple([4])
        padded = padded_seq_len(longest + self.spare, cp_size=size, pad_multiple=multiple)
        return SequenceLayout.of_padded(padded, cp_rank=rank, cp_size=size)


class Run:
    """One forward and backward of a case's layer on a rank."""

    def __init__(self, case, group, coefficient):
        self.case, self.group = case, group
        self.config = tiny_config(
            [4],
            context_parallel=case.options(coefficient),
            sliding_window=case.window,
            index_topk=case.topk,
        )
        self.layer = ContextParallelAttention(self.config, 0, cpu_backend())
        randomise(self.layer, case.seed)
        for name, parameter in self.layer.named_parameters():
            is_indexers = name.startswith(INDEXER)
            parameter.requires_grad_(coefficient > 0 if is_indexers else not case.alone)

        generator = torch.Generator().manual_seed(case.seed + 1)
        longest = max(map(sum, case.documents))
        self.tokens = torch.randn(len(case.documents), longest, 64, generator=generator)
        weight = torch.randn(self.tokens.shape, generator=generator)
        self.layout = case.layout(cp_rank(group), cp_size(group))
        self.hidden = self.own(self.tokens)
        self.out = self.forward(coefficient)
        loss = (self.out * self.own(weight)).sum()
        # AutoModel's recipes set it, and jobs before this one may have.
        with patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(SCALE)):
            if loss.requires_grad:
                loss.backward()

    def own(self, whole):
        """Return this rank's part of a tensor [B, longest, ...]; nothing of padding."""
        real = torch.zeros(whole.shape[:2], dtype=torch.bool)
        for row, lengths in enumerate(self.case.documents):
            real[row, : sum(lengths)] = True
        whole = whole * real.unflatten(-1, (-1, *[1] * (whole.ndim - 2)))
        layout = self.layout
        more = layout.local_len * layout.cp_size - whole.shape[1]
        padded = pad(whole, (*[0] * 2 * (whole.ndim - 2), 0, more))
        own = padded[:, layout.start : layout.end].clone()
        return own.requires_grad_(own.is_floating_point() and not self.case.alone)

    def forward(self, coefficient):
        rows, length, _ = self.hidden.shape
        step = StepContext(self.layout, self.group, self.config.context_parallel)
        if coefficient:
            real = self.own(torch.ones(self.tokens.shape[:2], dtype=torch.long)).bool()
            step.loss_weights_BL1 = token_weights(
                ~real, rows, length, self.group, self.hidden.device
            )
        rotary = DeepseekV4RotaryEmbedding(THETA, self.config.head_dim, 0.5)
        rope = rotary(self.hidden, self.layout.document_positions().expand(rows, -1))

        layer = self.layer
        if self.case.compiled:
            torch._dynamo.reset()
            layer = torch.compile(layer, backend="aot_eager")

        def run(hidden):
            of_layer = {"position_embeddings_compress": rope, "rotary_compress": rotary}
            return layer(hidden, rope, **of_layer, **{STEP_KEY: step})[0]

        if not self.case.recompute:
            return run(self.hidden)
        selective = {"context_fn": make_selective_checkpoint_context_fn()}
        how = selective if self.case.recompute == "selective" else {}
        return checkpoint(run, self.hidden, use_reentrant=False, **how)

    def gradients(self):
        """Return gradients by name, that of the input first; absent where there is none."""
        named = {"hidden": self.hidden.grad}
        named |= {name: p.grad for name, p in self.layer.named_parameters()}
        return {name: grad for name, grad in named.items() if grad is not None}


def loss_job(group, rank, case):
    """Return differences of a layer with the loss from the definition and from one without it.

    And the definition's margin.
    """
    size = cp_size(group)
    without, run = (Run(case, group, coefficient) for coefficient in (0.0, COEFFICIENT))
    expected = indexer_loss(
        run.layer.state_dict(), run.config, run.tokens, case.documents, full=case.full, theta=THETA
    )
    assert run.layer.indexer_losses.forwards == 1
    assert without.layer.indexer_losses.take() is None
    loss, captured = all_reduce_sum(run.layer.indexer_losses.take(), [group]).tolist()
    differences = [
        Difference("loss", abs(loss - expected.loss), OUTPUT_LIMIT),
        Difference("captured", abs(captured - expected.captured), OUTPUT_LIMIT),
        Difference("output", float((run.out - without.out).detach().abs().max()), 0.0),
    ]
    found, others = run.gradients(), without.gradients()
    for name, theirs in expected.gradients.items():
        mine = all_reduce_sum(found.pop(name), [group]) / (COEFFICIENT * SCALE)
        gap = float((mine - theirs).abs().max())
        largest = max(float(theirs.abs().max()), SMALLEST)
        differences.append(Difference(name, gap / largest, GRADIENT_LIMIT))
    assert found.keys() == others.keys()
    assert case.alone == (not others)
    for name, theirs in others.items():
        limit = 0.0 if size == 1 else 1e-6
        differences.append(Difference(f"{name}, of the rest", worst(found[name], theirs), limit))
    return differences, expected.margin


def check(ranks, size, case):
    """Return whether float32 selects what float64 does; hold all differences to their limits."""
    results = ranks.run(loss_job, size, case)
    if min(margin for _, margin in results) <= UNDECIDED:
        return False
    assert_parity([differences for differences, _ in results])
    return True


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_a_compiled_layer_has_the_gradients_of_an_eager_one(full):
    case = Case([[30, 40, 9]], packed=True, full=full)
    with torch.compiler.set_stance("default"):
        eager, compiled = (
            Run(replace(case, compiled=each), None, COEFFICIENT).gradients()
            for each in (False, True)
        )
    assert eager.keys() == compiled.keys()
    for name, grad in eager.items():
        assert worst(compiled[name], grad) <= 1e-5, name


def received_job(group, rank, case, coefficient):
    """Return the collectives of a forward and backward, and the bytes of each."""
    received = []

    def recorded(name, original):
        def collective(into, *arguments, **kwargs):
            received.append((name, into.numel() * into.element_size()))
            return original(into, *arguments, **kwargs)

        return collective

    with ExitStack() as stack:
        for home, name in (
            (collectives, "all_gather_single"),
            (collectives, "reduce_scatter_single"),
            (collectives.dist, "all_to_all_single"),
        ):
            recording = recorded(name, getattr(home, name))
            stack.enter_context(patch.object(home, name, recording))
        Run(case, group, coefficient)
    return received


DOCUMENTS = [[1, 30, 3, 47, 4, 9], [60, 14]]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_those_of_the_definition(ranks, packed, size, full):
    documents = DOCUMENTS if packed else [[95], [30]]
    case = Case(documents, packed, full, balance="on", recompute="full")
    assert check(ranks, size, case)


@pytest.mark.parametrize("balance", ["on", "off"])
def test_ranks_receive_gradients_of_the_indexer_and_nothing_else_more(ranks, balance):
    """What they receive without a loss is counted in tests/tools/test_inventory_bytes.py."""
    case = Case([[96]], balance=balance)
    without, found = (ranks.run(received_job, 2, case, c)[0] for c in (0.0, COEFFICIENT))
    moved = 24 if balance == "on" else 0  # queries that rank 0 computes for rank 1, and the reverse
    keys, fetched = 12 * 16 * 4, moved * 4
    scores_and_halo = moved * 16 * 4 + 4 * 2 * 16 * 4
    assert found.pop(-2) == ("reduce_scatter_single", keys)
    expected = [received for _, received in without]
    expected[0] += fetched
    expected[-1] += scores_and_halo
    assert [received for _, received in found] == expected


@st.composite
def cases(draw):
    packed = draw(st.booleans())
    lengths = st.one_of(st.integers(1, 12), st.integers(1, 90))
    of_row = (
        st.lists(lengths, min_size=1, max_size=6)
        if packed
        else st.integers(1, 200).map(lambda length: [length])
    )
    return Case(
        documents=draw(st.lists(of_row, min_size=1, max_size=2)),
        packed=packed,
        full=draw(st.booleans()),
        transport=draw(st.sampled_from(["boundary", "all_gather"])),
        balance=draw(st.sampled_from(["on", "on", "off"])),
        overlap=draw(st.booleans()),
        keep=draw(st.booleans()),
        recompute=draw(st.sampled_from(["", "full", "selective"])),
        alone=draw(st.sampled_from([False, False, True])),
        spare=draw(st.integers(0, 5)),
        window=draw(st.integers(1, 40)),
        topk=draw(st.sampled_from([1, 3, 8, 24])),
        workspace_mib=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 99)),
    )


def drawn(count):
    # No shrinking: after a failed case the workers start anew, which takes seconds.
    return settings(
        max_examples=count,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@drawn(examples(fixed=15, random=25, many=100))
@given(size=st.integers(1, 4), case=cases())
def test_any_layer_has_the_loss_of_the_definition(ranks, size, case):
    assume(check(ranks, size, case))


@pytest.mark.slow
@drawn(200)
@given(size=st.integers(1, 4), case=cases())
def test_many_layers_have_the_loss_of_the_definition(ranks, size, case):
    assume(check(ranks, size, case))
