# SPDX-License-Identifier: Apache-2.0
"""Bytes of 4-bit cache formats, against what AutoModel trains with."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_dsv4_cp.kernels.reference import cache_formats
from nemo_dsv4_cp.kernels.reference.cache_formats import (
    MXFP4,
    NVFP4,
    CacheCodec,
    decode,
    encode,
)

quantization = pytest.importorskip(
    "nemo_automodel.components.models.deepseek_v41.quantization",
    reason="this release of AutoModel has no DeepSeek-V4.1",
)

FORMATS = [NVFP4, MXFP4]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def automodels(values, format):
    return quantization.quantize_cache(values, format=format.name, block_size=format.block)


def stored(values, format):
    return decode(encode(values, format), format, width=values.shape[-1], dtype=values.dtype)


def bits_of(values):
    """Tell -0.0 from 0.0, and no NaN from another."""
    return values.where(~values.isnan(), torch.nan).view(BITS[values.dtype])


def assert_same_bits(values, format):
    mine, theirs = stored(values, format), automodels(values, format)
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    assert torch.equal(bits_of(mine), bits_of(theirs))


@pytest.mark.parametrize("format", FORMATS)
@given(
    seed=st.integers(0, 1 << 30),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 80)),
    spread=st.sampled_from([0, 2, 12, 120]),
    dtype=st.sampled_from(list(BITS)),
)
def test_decoded_bytes_are_automodels_values_bit_by_bit(format, seed, shape, spread, dtype):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    # Powers of two, a block's and a number's own, with a fifth of all numbers zeros of either sign.
    for part in ((*shape[:-1], 1), shape):
        exponents = (torch.rand(part, generator=generator) - 0.5) * spread
        values = values * exponents.round().exp2()
    values = values * (torch.rand(shape, generator=generator) > 0.2)
    assert_same_bits(values.to(dtype), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize("exponent", [-149, -133, -128, -126, -9, -6, 0, 3, 8, 100, 125])
def test_ties_and_their_neighbors_round_as_automodels(format, dtype, exponent):
    between = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    exact = torch.cat([MAGNITUDES, between, MAGNITUDES[-1:]]).to(dtype)
    bits = exact.view(BITS[dtype])
    near = torch.cat([exact, (bits + 1).view(dtype), (bits - 1).clamp_min(0).view(dtype)])
    # Each beside a 6 that sets the scale, the others zeros.
    rows = torch.zeros(len(near), format.block, dtype=dtype)
    rows[:, 0], rows[:, -1] = near, 6
    rows = (rows.double() * 2.0**exponent).to(dtype)
    assert_same_bits(torch.cat([rows, -rows]), format)


@pytest.mark.parametrize("format", FORMATS)
def test_every_bfloat16_sets_the_scale_that_it_sets_in_automodel(format):
    largest = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    steps = torch.linspace(-1, 1, format.block)
    assert_same_bits((largest[:, None].double() * steps).float(), format)
    assert_same_bits((largest[:, None].double() * steps).bfloat16(), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 3e38, -3e38])
def test_what_is_not_finite_is_as_in_automodel_but_for_signs(format, number):
    values = torch.linspace(-2, 2, 3 * format.block)
    values[format.block + 1] = number
    mine, theirs = stored(values, format), automodels(values, format)
    torch.testing.assert_close(mine.abs(), theirs.abs(), rtol=0, atol=0, equal_nan=True)


def test_vectors_of_deepseek_v41_take_288_and_68_bytes():
    assert encode(torch.randn(2, 3, 512), NVFP4).shape == (2, 3, 288)
    assert encode(torch.randn(2, 3, 128), MXFP4).shape == (2, 3, 68)
    assert encode(torch.randn(2, 3, 128), MXFP4).dtype == torch.uint8


@pytest.mark.parametrize("format", FORMATS)
def test_a_byte_holds_the_scales_of_all_finite_numbers(format):
    ends = torch.tensor([0.0, 2.0**-149, torch.finfo(torch.float32).max])
    zero, least, largest = encode(ends[:, None], format)[:, -1].tolist()
    assert zero == least == 1
    # NVFP4's largest is 448 or, in older releases of torch, a NaN.
    assert largest in ([253] if format is MXFP4 else [0x7E, 0x7F])


@pytest.mark.parametrize("format", FORMATS)
def test_chunks_change_nothing(format, monkeypatch):
    values = torch.randn(3, 7, 70).transpose(0, 1)
    whole = encode(values, format)
    decoded = stored(values, format)
    monkeypatch.setattr(cache_formats, "_CHUNK", 150)
    assert torch.equal(encode(values, format), whole)
    assert torch.equal(stored(values, format), decoded)


def test_a_codec_returns_the_dtype_that_it_is_bound_to():
    values = torch.randn(5, 70).bfloat16().requires_grad_()
    codec = CacheCodec(NVFP4, 70, torch.bfloat16)
    codes = codec.encode(values)
    assert not codes.requires_grad
    assert torch.equal(codec.decode(codes), stored(values.detach(), NVFP4))
