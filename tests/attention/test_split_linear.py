# SPDX-License-Identifier: Apache-2.0
"""``compressor_precision: bf16x3``: float32's projections of bfloat16 activations."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dsv4_cp.attention import ContextParallelAttention, split_linear
from nemo_dsv4_cp.attention.compressor import split_projections, window_features
from nemo_dsv4_cp.attention.split_linear import SplitLinear
from tests.attention.test_bfloat16 import rounded
from tests.parity import attend, cpu_backend, randomise, tiny_config

TOKENS, WIDTH, FEATURES = 40, 256, 64
ACCURATE = 2e-6
"""Of float32's sums of 256 products, relative to the largest sum."""


class Projections(nn.Module):
    """What ``window_features`` takes of a compressor."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.head_dim = FEATURES // 2
        for name in ("wkv", "wgate"):
            linear = nn.Linear(WIDTH, FEATURES, bias=False)
            linear.weight.data.normal_(generator=draw)
            setattr(self, name, linear)


def features_of(module, hidden):
    exact = hidden.dtype is torch.bfloat16
    return window_features(module, hidden.float(), overlaps=False, exact=exact)["features"]


def project(module, hidden):
    """Return features, and the gradients of hidden states and weights for drawn ones of theirs."""
    hidden = hidden.clone().requires_grad_()
    features = features_of(module, hidden)
    draw = torch.Generator().manual_seed(1)
    features.backward(torch.randn(features.shape, generator=draw).to(features.device))
    return features.detach(), hidden.grad.float(), module.wkv.weight.grad, module.wgate.weight.grad


def hidden_states(dtype):
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def both(dtype, device="cpu"):
    exact, module = Projections().to(device), Projections().to(device)
    split_projections(module)
    assert isinstance(module.wkv, SplitLinear) and isinstance(module.wgate, SplitLinear)
    return [project(each, hidden_states(dtype).to(device)) for each in (module, exact)]


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_features_and_gradients_are_as_accurate_as_float32(device):
    mine, expected = both(torch.bfloat16, device)
    names = ("features", "hidden states", "wkv", "wgate")
    for name, a, b in zip(names, mine, expected, strict=True):
        # The gradient of hidden states is rounded to bfloat16: one place of it may differ.
        limit = 2**-8 if name == "hidden states" else ACCURATE
        assert relative(a, b) < limit, name
    differing = (mine[1] != expected[1]).float().mean()
    assert differing < 0.02  # one rounding in 2^7 at an error of 2^-16


class Products(TorchDispatchMode):
    """Counts matrix products by overload."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func._schema.name:
            self.found[str(func)] += 1
        return func(*args, **kwargs or {})


def test_gpus_multiply_bfloat16_into_float32():
    with FakeTensorMode(), Products() as products:
        x = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, device="cuda")
        grad = torch.empty(TOKENS, FEATURES, dtype=torch.bfloat16, device="cuda")
        of_weight = split_linear._sum([(grad.t(), x)] * 3)
    assert of_weight.shape == (FEATURES, WIDTH) and of_weight.dtype is torch.float32
    assert products.found == {"aten.mm.dtype": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_activations_of_other_dtypes_stay_in_float32(dtype):
    mine, expected = both(dtype)
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_linears_that_lora_changed_keep_its_forward():
    lora = pytest.importorskip("nemo_automodel.components._peft.lora")
    module = Projections()
    split_projections(module)
    lora.patch_linear_module(module.wkv, dim=2, use_triton=False)
    assert isinstance(module.wkv, SplitLinear)
    hidden = hidden_states(torch.bfloat16)
    features = features_of(module, hidden)
    expected = hidden.float() @ Projections().wkv.weight.T  # the adapter begins with zeros
    assert relative(features[..., :FEATURES], expected) < ACCURATE


def layer_job(ratio, options, dtype):
    config = tiny_config([ratio], context_parallel=options)
    layer = ContextParallelAttention(config, 0, cpu_backend()).float()
    randomise(layer, 3)
    layer = rounded(layer) if dtype is torch.bfloat16 else layer
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(1, 512, config.hidden_size, generator=draw).to(dtype)
    return layer, attend(layer, config, x, None, 0).detach()


@pytest.mark.parametrize("ratio", [4, 128])
def test_the_option_changes_layers_of_bfloat16_by_less_than_a_rounding(ratio):
    option = {"compressor_precision": "bf16x3"}
    layer, out = layer_job(ratio, option, torch.bfloat16)
    assert isinstance(layer.compressor.wkv, SplitLinear)
    _, expected = layer_job(ratio, {}, torch.bfloat16)
    assert relative(out.float(), expected.float()) < 2**-7
    _, out = layer_job(ratio, option, torch.float32)
    _, expected = layer_job(ratio, {}, torch.float32)
    assert torch.equal(out, expected)


def fsdp_job(group, rank):
    """Compare sharded projections, and what FSDP2 reduces, with whole ones."""
    module, whole = Projections(), Projections()
    split_projections(module)
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for linear in (module.wkv, module.wgate):
        fully_shard(linear, mesh=DeviceMesh.from_group(group, "cpu"), mp_policy=policy)
        assert type(linear).forward is SplitLinear.forward
    hidden = hidden_states(torch.bfloat16)
    mine, expected = project(module, hidden), project(whole, hidden)
    gradients = [gradient.full_tensor() for gradient in mine[2:]]
    return [
        relative(a, b)
        for a, b in zip((*mine[:1], *gradients), (expected[0], *expected[2:]), strict=True)
    ]


def test_fsdp2_shards_and_reduces_the_weights(ranks):
    for errors in ranks.run(fsdp_job, 2):
        assert max(errors) < ACCURATE


def test_a_copied_layer_splits_too():
    layer, _ = layer_job(4, {"compressor_precision": "bf16x3"}, torch.float32)
    assert isinstance(copy.deepcopy(layer).compressor.indexer.wgate, SplitLinear)


@pytest.mark.parametrize("shape", [(0, TOKENS), (2, 0)])
def test_no_tokens_have_no_features(shape):
    module = Projections()
    SplitLinear.adopt(module.wkv)
    found = module.wkv(torch.zeros(*shape, WIDTH), exact=True)
    assert found.shape == (*shape, FEATURES)
    found.sum().backward()
    assert not module.wkv.weight.grad.any()
