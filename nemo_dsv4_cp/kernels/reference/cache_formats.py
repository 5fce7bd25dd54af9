# SPDX-License-Identifier: Apache-2.0
"""The bytes of compressed KV entries and index keys that DeepSeek-V4.1 trains quantized.

Training rounds both to 4-bit numbers, with one scale per block of them, and computes with the
rounded values in bfloat16. Here is the form that holds the same values in a quarter of the bytes,
for the all-gather to move: decoded, it is what AutoModel's ``quantize_cache`` returns, bit by bit.

A number x of a block with scale s becomes the E2M1 value closest to x / s, of two equally close
ones that with the even code:

    code       0    1    2    3    4    5    6    7    + 8 where x is negative, -0.0 included
    magnitude  0   0.5   1   1.5   2    3    4    6

One vector is its codes, two per byte and the first in the low half, and then its scales, one byte
per block. A last block that is not full gets the scale of what it has.

NaN and infinities come out as from ``quantize_cache``, except that there the device decides on the
sign of an infinity, and of zeros in a block with a NaN:

- NVFP4: a NaN makes its block NaN. Scales beyond 448, those of infinities too, become what torch
  converts them to: 448 in torch 2.13 on CPUs, NaN in older releases.
- MXFP4: a NaN makes its block zeros. An infinity remains one and makes other numbers of its block
  NaN. A number of magnitude 3.5 * 2**126 or more becomes an infinity.
"""

# D numbers of a vector   G blocks of it   b numbers of a block   C vectors of a chunk

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

_LARGEST = 6.0
_BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Halfway between magnitudes; those in even places round down, to an even code."""

_CHUNK = 1 << 24
"""Numbers that are encoded or decoded at a time: 64 MiB for each float32 copy of them."""


@dataclass(frozen=True)
class CacheFormat:
    """How a vector's numbers become bytes.

    Attributes:
        name: As AutoModel names it.
        block: Consecutive numbers that share a scale; even.
        scale: How a scale is rounded and stored in a byte: ``"e4m3"`` to the nearest number of
            torch's ``float8_e4m3fn``, or ``"e8m0"`` up to a power of two, as its float32 exponent
            field. Finite numbers need the fields 1 to 253.
    """

    name: Literal["nvfp4", "mxfp4"]
    block: int
    scale: Literal["e4m3", "e8m0"]

    def bytes_of(self, width: int) -> int:
        """Return the bytes of a vector of ``width`` numbers."""
        return math.ceil(width / 2) + math.ceil(width / self.block)


NVFP4 = CacheFormat("nvfp4", 16, "e4m3")
"""Of compressed KV entries: 288 bytes for 512 numbers."""

MXFP4 = CacheFormat("mxfp4", 32, "e8m0")
"""Of index keys: 68 bytes for 128 numbers."""


@dataclass(frozen=True)
class CacheCodec:
    """A format bound to one kind of vector: what an all-gather needs to move it in bytes.

    Attributes:
        format: How numbers become bytes.
        width: D.
        dtype: Of decoded values.
    """

    format: CacheFormat
    width: int
    dtype: torch.dtype

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return the bytes [..., bytes] of values [..., D]."""
        return encode(values, self.format)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the values [..., D] of bytes [..., bytes]."""
        return decode(codes, self.format, width=self.width, dtype=self.dtype)


def encode(values: torch.Tensor, format: CacheFormat) -> torch.Tensor:
    """Quantize vectors to bytes.

    Args:
        values: [..., D] of a floating dtype; it is rounded to float32 first.
        format: How.

    Returns:
        [..., format.bytes_of(D)] of uint8, without gradient.
    """
    width = values.shape[-1]
    rows = values.detach().reshape(values.shape[:-1].numel(), width)
    codes = rows.new_empty(len(rows), format.bytes_of(width), dtype=torch.uint8)
    for chunk in _chunks(len(rows), width):
        codes[chunk] = _encoded(rows[chunk], format)
    return codes.view(*values.shape[:-1], codes.shape[1])


def decode(
    codes: torch.Tensor, format: CacheFormat, *, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the vectors that bytes stand for.

    Args:
        codes: [..., format.bytes_of(width)] of uint8, from :func:`encode`.
        format: As there.
        width: D.
        dtype: Of the result, rounded from float32.

    Returns:
        [..., D] of ``dtype``.
    """
    rows = codes.reshape(codes.shape[:-1].numel(), codes.shape[-1])
    values = rows.new_empty(len(rows), width, dtype=dtype)
    for chunk in _chunks(len(rows), width):
        values[chunk] = _decoded(rows[chunk], format, width)
    return values.view(*codes.shape[:-1], width)


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // width)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def _encoded(rows_CD: torch.Tensor, format: CacheFormat) -> torch.Tensor:
    width = rows_CD.shape[1]
    padded_CD = F.pad(rows_CD, (0, -width % format.block)).float()
    blocks_CGb = padded_CD.unflatten(1, (-1, format.block))
    stored_CG = _stored_scales(blocks_CGb.abs().amax(-1), format)
    magnitudes_CGb = (blocks_CGb / _scales(stored_CG, format)[..., None]).abs_()
    codes_CGb = torch.signbit(blocks_CGb).to(torch.uint8).mul_(8)
    for place, between in enumerate(_BETWEEN):
        below = magnitudes_CGb <= between if place % 2 == 0 else magnitudes_CGb < between
        codes_CGb += below.logical_not_()  # where x / s is NaN, as AutoModel, the largest code
    codes_CD = codes_CGb.flatten(1)[:, : width + width % 2]
    return torch.cat([codes_CD[:, ::2] | codes_CD[:, 1::2] << 4, stored_CG], dim=1)


def _decoded(rows: torch.Tensor, format: CacheFormat, width: int) -> torch.Tensor:
    pairs = math.ceil(width / 2)
    packed, stored_CG = rows[:, :pairs], rows[:, pairs:]
    codes_CD = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    codes_CD = F.pad(codes_CD, (0, stored_CG.shape[1] * format.block - codes_CD.shape[1]))
    # E4M3 has E2M1's sign, exponent and mantissa among its own, and 1 / 64 of its values.
    as_e4m3 = ((codes_CD & 7) << 2) | ((codes_CD & 8) << 4)
    numbers_CD = as_e4m3.view(torch.float8_e4m3fn).float().mul_(64)
    blocks_CGb: torch.Tensor = numbers_CD.unflatten(1, (-1, format.block))
    return blocks_CGb.mul_(_scales(stored_CG, format)[..., None]).flatten(1)[:, :width]


def _stored_scales(largest_CG: torch.Tensor, format: CacheFormat) -> torch.Tensor:
    """Return the bytes of the scales that bring each block's largest magnitude to about 6.

    By a division here and a product there, as AutoModel: where a scale is halfway between two, the
    rounding of that operation decides, and GPUs divide by a constant otherwise than CPUs.
    """
    if format.scale == "e4m3":
        scales = largest_CG.clamp_min(_LARGEST * 2**-9) / _LARGEST
        return scales.to(torch.float8_e4m3fn).view(torch.uint8)
    scales = largest_CG.clamp_min(_LARGEST * 2**-126) * (1 / _LARGEST)
    # Any bit of the mantissa carries into the exponent: a power of two, rounded up.
    return ((scales.view(torch.int32) + 0x7FFFFF) >> 23).to(torch.uint8)


def _scales(stored_CG: torch.Tensor, format: CacheFormat) -> torch.Tensor:
    if format.scale == "e4m3":
        return stored_CG.view(torch.float8_e4m3fn).float()
    return (stored_CG.to(torch.int32) << 23).view(torch.float32)
