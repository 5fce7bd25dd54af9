# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from nemo_automodel.components.models.deepseek_v4.layers import (
    DeepseekV4RotaryEmbedding,
    _apply_partial_rope,
    _rms_norm_last_dim,
)

from nemo_dsv4_cp.kernels.reference.rotary import norm_and_rotate, rotate_


@pytest.mark.parametrize("workspace_bytes", [1, 4096, 1 << 30])
def test_norm_and_rotation_are_automodels_there_and_back(workspace_bytes):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 2, 37, 3, 24, generator=generator)
    cos, sin = DeepseekV4RotaryEmbedding(10000.0, 24, 1 / 3)(x, torch.arange(37).expand(2, -1))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    turned = norm_and_rotate(mine, cos, sin, eps=1e-6, workspace_bytes=workspace_bytes)
    # A product in between: rotating back in place must not touch what others have saved.
    back = rotate_(turned * 2, cos, -sin, workspace_bytes=workspace_bytes)
    expected = _rms_norm_last_dim(theirs.transpose(1, 2), 1e-6)
    expected = _apply_partial_rope(expected, cos, sin, 8)
    expected_back = _apply_partial_rope(expected * 2, cos, -sin, 8).transpose(1, 2)

    torch.testing.assert_close(turned, expected.transpose(1, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(back, expected_back, atol=1e-6, rtol=0)
    (back * weight).sum().backward()
    (expected_back * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=0)


def test_only_the_input_is_saved_for_backward():
    x = torch.randn(1, 64, 4, 32).requires_grad_()
    cos, sin = torch.ones(1, 64, 8), torch.zeros(1, 64, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = norm_and_rotate(x * 1, cos, sin, eps=1e-6, workspace_bytes=1 << 20)
        rotate_(out * 1, cos, -sin, workspace_bytes=1 << 20)
    assert [t.shape for t in saved if t.numel() >= x.numel()] == [x.shape]
