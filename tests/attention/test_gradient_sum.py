# SPDX-License-Identifier: Apache-2.0
"""The gradient of V4.1's entries: summed over the layers in float32, rounded once."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("nemo_automodel.components.models.deepseek_v41")

from nemo_automodel.components.distributed.activation_checkpointing import (
    make_selective_checkpoint_context_fn,
)
from nemo_automodel.components.models.deepseek_v41.attention import DeepseekV41AttentionState

from nemo_dsv4_cp.attention import layer_v41
from nemo_dsv4_cp.attention.gradient_sum import GradientSum, summing_gradients
from nemo_dsv4_cp.kernels.reference import TorchKernels
from tests.parity import cpu_backend, randomise
from tests.parity_v41 import tiny_config

READERS, LENGTH = 8, 64
SELECTIVE = {"context_fn": make_selective_checkpoint_context_fn()}


@pytest.fixture(autouse=True)
def one_thread():
    """Small products wait for threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Separate(TorchKernels):
    """Kernels that know of no sum, as TileLang's."""

    def attend_rotated(self, queries, keys, scale):
        return super().attend_rotated(queries, replace(keys, entries_grad=None), scale)


class Layers:
    """A source and layers that reuse its entries, each with a hidden state of its own."""

    def __init__(self, dtype=torch.bfloat16, kernels=TorchKernels):
        text = tiny_config(
            {},
            num_hidden_layers=READERS,
            compress_ratios=[2] * READERS,
            kv_source_layer_ids=[0],
            index_source_layer_ids=[0],
            candidate_source_layer_id=-1,
            engram_layer_ids=[],
            engram_num_embeddings=[],
        ).text_config
        text.torch_dtype = dtype
        generator = torch.Generator().manual_seed(0)
        self.layers, self.hidden = [], []
        for number in range(READERS):
            layer = layer_v41.ContextParallelAttentionV41(text, number, cpu_backend())
            randomise(layer, number)
            layer._kernels = kernels(workspace_bytes=1 << 28)
            self.layers.append(layer)
            hidden = torch.randn(1, LENGTH, text.hidden_size, generator=generator)
            self.hidden.append(hidden.to(dtype).requires_grad_())
        self.gradients = []  # of the entries of each forward, before the source

    def forward(self, monkeypatch, saving=None):
        """Return the sum of all outputs, and the last state."""

        def watched(entries):
            if entries.requires_grad:
                entries.register_hook(self.gradients.append)
            return summing_gradients(entries)

        monkeypatch.setattr(layer_v41, "summing_gradients", watched)
        state, total = DeepseekV41AttentionState(), torch.zeros(())
        positions = torch.arange(LENGTH)[None]
        for layer, hidden in zip(self.layers, self.hidden, strict=True):

            def run(x, state, layer=layer):
                return layer(x, position_ids=positions, state=state)

            if saving is None:
                out = run(hidden, state)
            else:
                out = checkpoint(run, hidden, state, use_reentrant=False, **saving)
            state = out.state
            total = total + out.hidden_states.float().square().sum()
        return total, state


@pytest.mark.parametrize("kernels", [TorchKernels, Separate])
def test_it_is_the_float32_sum_over_layers_rounded_once(monkeypatch, kernels):
    layers = Layers(kernels=kernels)
    layers.forward(monkeypatch)[0].backward()
    (found,) = layers.gradients
    parts = []  # each layer's, in float32

    def own(self):
        parts.append(torch.zeros(self._shape))
        return parts[-1]

    with monkeypatch.context() as patch:
        patch.setattr(GradientSum, "total", own)
        layers.forward(monkeypatch)[0].backward()
    assert len(parts) == READERS
    exact = torch.stack(parts).double().sum(dim=0)
    assert found.dtype == torch.bfloat16
    apart = (found.double() - exact).abs()
    # Half a unit in the last place, but for what float32 rounds.
    assert (apart <= 2**-8 * exact.abs() * 1.001 + 1e-6 * exact.abs().max()).all()
    in_bfloat16 = torch.zeros_like(found)
    for part in parts:
        in_bfloat16 += part.bfloat16()
    assert apart.square().sum() < 0.5 * (in_bfloat16.double() - exact).square().sum()


@pytest.mark.parametrize(
    ("kernels", "saving"),
    [(TorchKernels, {}), (TorchKernels, SELECTIVE), (Separate, {})],
    ids=["full", "selective", "kernels that know of no sum"],
)
def test_checkpointing_changes_nothing(monkeypatch, kernels, saving):
    layers = Layers(kernels=kernels)
    layers.forward(monkeypatch)[0].backward()
    weights = [p.grad for each in layers.layers for p in each.parameters()]
    for each in layers.layers:
        each.zero_grad()
    layers.forward(monkeypatch, saving)[0].backward()
    again = [p.grad for each in layers.layers for p in each.parameters()]
    assert torch.equal(*layers.gradients)
    for one, other in zip(weights, again, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_forwards_in_flight_have_sums_of_their_own(monkeypatch):
    layers = Layers()
    first, second = (layers.forward(monkeypatch)[0] for _ in range(2))
    (3 * second).backward()
    first.backward()
    second_gradient, first_gradient = layers.gradients
    layers.forward(monkeypatch)[0].backward()
    assert torch.equal(layers.gradients[-1], first_gradient)
    assert not torch.equal(second_gradient, first_gradient)


def test_a_graph_that_is_kept_gives_the_same_again(monkeypatch):
    layers = Layers()
    total, _ = layers.forward(monkeypatch)
    total.backward(retain_graph=True)
    (gradient,) = torch.autograd.grad(total, layers.hidden[0])
    one, other = layers.gradients
    assert torch.equal(one, other)
    assert gradient.any()


def test_the_gradient_of_entries_alone_is_refused_and_leaves_nothing(monkeypatch):
    layers = Layers()
    total, state = layers.forward(monkeypatch)
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(total, state.entries_BPD, retain_graph=True)
    total.backward()
    layers.forward(monkeypatch)[0].backward()
    assert torch.equal(*layers.gradients)


def test_what_reads_the_entries_by_itself_is_added(monkeypatch):
    layers = Layers()
    total, state = layers.forward(monkeypatch)
    total.backward(retain_graph=True)
    (total + state.entries_BPD.float().sum()).backward()
    one, other = layers.gradients
    assert torch.allclose(other.float(), one.float() + 1, rtol=2**-7, atol=2**-7)


def test_without_gradients_and_in_float32_nothing_is_summed(monkeypatch):
    with torch.no_grad():
        _, state = Layers().forward(monkeypatch)
    assert state.entries_grad is None
    _, state = Layers(torch.float32).forward(monkeypatch)
    assert state.entries_grad is None


def test_a_layer_keeps_nothing_of_it(monkeypatch):
    layers = Layers()
    layers.forward(monkeypatch)  # no backward
    copied = Layers()
    copied.layers = copy.deepcopy(layers.layers)
    for each in (layers, copied):
        each.forward(monkeypatch)[0].backward()
    assert torch.equal(layers.gradients[-1], copied.gradients[-1])
