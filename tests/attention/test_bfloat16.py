# SPDX-License-Identifier: Apache-2.0
"""In bfloat16 a layer under CP is no further from float32 than AutoModel's own without it."""

import copy

import pytest
import torch
import torch.distributed as dist
from nemo_automodel.components.models.deepseek_v4.layers import (
    DeepseekV4Attention,
    build_causal_padding_mask,
)

from nemo_dsv4_cp.attention import ContextParallelAttention
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from tests.parity import attend, cpu_backend, randomise, tiny_config

LENGTH = 1024
IN_FLOAT32 = ("sinks_param", "ape_param", ".wkv", ".wgate")
"""Ends of the names of modules that AutoModel keeps in float32, of a compressor and its indexer."""


def rounded(layer):
    """Return a copy in bfloat16 but for what AutoModel keeps in float32."""
    copied = copy.deepcopy(layer).bfloat16()
    for name, module in copied.named_modules():
        if name.endswith(IN_FLOAT32):
            module.float().load_state_dict(layer.get_submodule(name).state_dict())
    return copied


def backward(layer, config, hidden, weight, mask, start):
    """Return the output and the input's gradient; parameters keep theirs."""
    x = hidden.to(layer.wq_a.weight.dtype, copy=True).requires_grad_()
    out = attend(layer, config, x, mask, start)
    (out.float() * weight).sum().backward()
    return out.detach().float(), x.grad.float()


def errors_job(group, rank, ratio, options, seed):
    """Return squared errors, ours and AutoModel's, and of how many entries.

    Of this rank's shard of the output and the input's gradient; of each parameter's gradient.
    """
    config = tiny_config([ratio], context_parallel=options)
    exact = DeepseekV4Attention(config, 0, cpu_backend()).float()
    randomise(exact, seed)
    if ratio == 4:
        exact.compressor.indexer.requires_grad_(False)
    theirs = rounded(exact)
    mine = ContextParallelAttention(config, 0, cpu_backend())
    mine.load_state_dict(exact.state_dict())
    mine = rounded(mine)
    for name, parameter in mine.named_parameters():
        parameter.requires_grad_(exact.get_parameter(name).requires_grad)
        assert parameter.dtype == theirs.get_parameter(name).dtype
    mine._cp_group = group
    size = dist.get_world_size(group)
    own = SequenceLayout(LENGTH // size, rank, size).own
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(2, 1, LENGTH, config.hidden_size, generator=draw).unbind()
    hidden = hidden.bfloat16().float()

    mask = build_causal_padding_mask(
        None, LENGTH, torch.float32, hidden.device, 1, config.sliding_window
    )
    right = backward(exact, config, hidden, weight, mask, 0)
    automodel = backward(theirs, config, hidden, weight, mask.bfloat16(), 0)
    here = slice(own.start, own.stop)
    ours = backward(mine, config, hidden[:, here], weight[:, here], None, own.start)

    def squared(a, b):
        return float((a - b).double().pow(2).sum())

    found = {}
    for name, a, b, c in zip(("output", "input gradient"), right, automodel, ours, strict=True):
        found[name] = (squared(c, a[:, here]), squared(b[:, here], a[:, here]), c.numel())
    for name, parameter in mine.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad.float()
        dist.all_reduce(gradient, group=group)  # in float32, as AutoModel reduces gradients
        expected, their = exact.get_parameter(name).grad, theirs.get_parameter(name).grad
        share = 1 / size  # the same on every rank
        errors = squared(gradient, expected) * share, squared(their, expected) * share
        found[name] = (*errors, gradient.numel())
    return found


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("balance", ["off", "on"])
def test_errors_are_no_larger_than_automodel(ranks, ratio, balance):
    every = [
        found
        for seed in range(4)
        for found in ranks.run(errors_job, 2, ratio, {"balance": balance}, seed)
    ]
    for name in every[0]:
        ours, theirs = (sum(found[name][whose] for found in every) ** 0.5 for whose in (0, 1))
        print(f"{name}: {ours:.3g}, AutoModel's {theirs:.3g}")
        assert theirs > 0
        # A few entries tell the ratio of two errors only roughly.
        limit = 1.1 if every[0][name][2] > 1000 else 1.5
        assert ours <= limit * theirs, name
