# SPDX-License-Identifier: Apache-2.0
"""A layer of which only some parameters train, and a layer that torch.compile traced."""

import pytest
import torch
from nemo_automodel.components.models.deepseek_v4.layers import DeepseekV4RotaryEmbedding

from nemo_dsv4_cp.attention import ContextParallelAttention
from nemo_dsv4_cp.attention.step import STEP_KEY, StepContext
from nemo_dsv4_cp.exchange.collectives import all_reduce_sum, cp_rank, cp_size
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.schedule import balanced
from tests.packed_parity import starts_of
from tests.parity import cpu_backend, randomise, tiny_config

LOCAL_LEN, SIZE = 40, 3
# Rank 1 computes no query of another rank here.
DOCUMENTS = [[*[1] * 40, 28, 4, 3, 3, 1, 1, 40]]


def layer(ratio, **options):
    config = tiny_config([ratio], sliding_window=5, context_parallel=options)
    attention = ContextParallelAttention(config, 0, cpu_backend())
    randomise(attention, 0)
    return attention


def call(attention, hidden, layout, group=None):
    step = StepContext(layout, group, attention._options)
    rotary = DeepseekV4RotaryEmbedding(10000.0, attention.head_dim, 0.5)
    rope = rotary(hidden, layout.document_positions().expand(len(hidden), -1))
    return lambda module: module(
        hidden,
        rope,
        position_embeddings_compress=rope,
        rotary_compress=rotary,
        **{STEP_KEY: step},
    )[0]


def gradients_job(group, rank, trained):
    """Return the gradients of the only parameters that train, summed over all ranks."""
    size = cp_size(group)
    attention = layer(4, balance="on")
    for name, parameter in attention.named_parameters():
        parameter.requires_grad_(trained in name and ".indexer." not in name)
    local_len = LOCAL_LEN * SIZE // size
    starts = starts_of(DOCUMENTS, LOCAL_LEN * SIZE)
    layout = SequenceLayout.of_documents(starts, local_len, cp_rank=cp_rank(group), cp_size=size)
    whole = torch.randn(1, LOCAL_LEN * SIZE, 64, generator=torch.Generator().manual_seed(1))
    hidden = whole[:, layout.start : layout.end]
    call(attention, hidden, layout, group)(attention).square().sum().backward()
    grads = [p.grad for p in attention.parameters() if p.requires_grad]
    return [all_reduce_sum(grad, [group]) for grad in grads]


@pytest.mark.parametrize("trained", ["sinks", "compressor."])
def test_a_rank_without_remote_queries_takes_part_in_the_exchange_of_gradients(ranks, trained):
    layout = SequenceLayout.of_documents(
        starts_of(DOCUMENTS, LOCAL_LEN * SIZE), LOCAL_LEN, cp_rank=0, cp_size=SIZE
    )
    assert [sum(map(len, runs)) for runs in balanced(layout).remote] == [12, 0, 12]
    (expected,) = ranks.run(gradients_job, 1, trained)
    assert expected
    for found in ranks.run(gradients_job, SIZE, trained):
        for mine, whole in zip(found, expected, strict=True):
            assert (mine - whole).abs().max() <= 5e-5 * whole.abs().max()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ratio", [pytest.param(4, marks=pytest.mark.slow), 128])
def test_a_compiled_layer_has_the_gradients_of_an_eager_one(ratio, packed):
    """AOTAutograd lost the gradient of what a Function wrote over after a graph break."""
    length = 189
    layout = SequenceLayout(length)
    if packed:
        starts = starts_of([[150, 39]], length)
        layout = SequenceLayout.of_documents(starts, length, cp_rank=0, cp_size=1)
    attention = layer(ratio)
    hidden = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(1))
    forward = call(attention, hidden, layout)
    torch._dynamo.reset()
    found = []
    with torch.compiler.set_stance("default"):
        for module in (attention, torch.compile(attention, backend="aot_eager")):
            attention.zero_grad()
            forward(module).square().sum().backward()
            found.append({n: p.grad for n, p in attention.named_parameters() if p.grad is not None})
    eager, compiled = found
    assert eager.keys() == compiled.keys()
    for name, grad in eager.items():
        assert (compiled[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name


@pytest.mark.slow
def test_a_compiled_layer_compiles_nothing_from_its_third_row_length_on():
    """Chunks were traced: each length compiled anew, and at ratio 4 the second raised."""
    attention, graphs = layer(4), []
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager")
    with torch.compiler.set_stance("default"):
        for length in (189, 256, 320):
            forward = call(attention, torch.randn(1, length, 64), SequenceLayout(length))
            forward(compiled).square().sum().backward()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[2]
