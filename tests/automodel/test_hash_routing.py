# SPDX-License-Identifier: Apache-2.0
"""Gates that route by token ids route the same in the recomputation of activation checkpointing."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nemo_dsv4_cp.automodel.hash_routing import _routed_by
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from tests.parity import cpu_backend, randomise, tiny_config

VISION = {"vision_n_layers": 1, "vision_dim": 64, "vision_n_heads": 4, "vision_inter_dim": 64}
HAS_VISION = hasattr(tiny_config([0]), "vision_n_layers")


def build(**changes):
    config = tiny_config([0, 4], num_hash_layers=2, **changes)
    model = DeepseekV4ContextParallelForCausalLM(config, backend=cpu_backend())
    model.initialize_weights(torch.device("cpu"), torch.float32)
    randomise(model, 0)
    # Ids that score-based routing would not choose by chance.
    for layer in model.model.layers.values():
        table = layer.mlp.gate.tid2eid
        table.copy_(torch.arange(table.numel()).view_as(table).flip(0) % 8)
    return model.train()


def gradients(model, batches):
    """Return the gradients of several batches whose forwards all come before the backwards."""
    losses = [model(ids).logits.logsumexp(-1).mean() for ids in batches]
    for loss in losses:
        loss.backward()
    names = ((n.replace("_checkpoint_wrapped_module.", ""), p) for n, p in model.named_parameters())
    return {name: p.grad for name, p in names if p.grad is not None}


@pytest.mark.parametrize("changes", [{}, VISION] if HAS_VISION else [{}], ids=str)
def test_checkpointed_experts_have_the_gradients_of_the_forward(changes):
    drawn = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 97, (1, length), generator=drawn) for length in (40, 24)]
    expected = gradients(build(**changes), batches)
    model = build(**changes)
    for layer in model.model.layers.values():
        layer.mlp = checkpoint_wrapper(layer.mlp)
    found = gradients(model, batches)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_ids_are_freed_with_their_forward():
    held = len(_routed_by)
    model = build()
    out = model(torch.ones(1, 16, dtype=torch.long))
    del out
    assert len(_routed_by) == held


def test_a_recomputation_from_another_tensor_is_refused():
    model = build()
    layer = model.model.layers["0"]
    layer.mlp.register_forward_pre_hook(
        lambda _, inputs: (inputs[0].clone(), *inputs[1:]), prepend=True
    )
    layer.mlp = checkpoint_wrapper(layer.mlp)
    with pytest.raises(RuntimeError, match="activation_checkpointing: false"):
        model(torch.ones(1, 16, dtype=torch.long)).logits.sum().backward()


def test_the_bias_of_a_gate_inside_a_checkpoint_wrapper_is_updated():
    config = tiny_config([0, 4], num_hash_layers=1)
    model = DeepseekV4ContextParallelForCausalLM(config, backend=cpu_backend()).train()
    model.initialize_weights(torch.device("cpu"), torch.float32)
    randomise(model, 0)
    for layer in model.model.layers.values():
        layer.mlp = checkpoint_wrapper(layer.mlp)
    model(torch.ones(1, 16, dtype=torch.long)).logits.sum().backward()
    model.update_moe_gate_bias()
    assert model.model.layers["1"].mlp.gate.e_score_correction_bias.abs().max() > 0
