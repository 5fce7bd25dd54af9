# SPDX-License-Identifier: Apache-2.0
"""Entries that move as the codes of a 4-bit format, over real gloo ranks."""

import pytest
import torch
from torch.distributed import get_world_size
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.kernels.reference.cache_formats import MXFP4, NVFP4, CacheCodec

TRANSPORTS = ["all_gather", "boundary"]
CASES = [(NVFP4, 512, 288), (MXFP4, 128, 68), (MXFP4, 40, 22)]
BATCH, LOCAL = 2, 3


class Collectives(TorchDispatchMode):
    """Notes what each collective fills: its name, dtype and bytes."""

    def __init__(self):
        super().__init__()
        self.filled = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            filled = args[0][0] if isinstance(args[0], list) else args[0]
            name = func.overloadpacket.__name__
            self.filled.append((name, filled.dtype, filled.numel() * filled.element_size()))
        return func(*args, **(kwargs or {}))


def shards_of(size, width, dtype):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, BATCH, LOCAL, width, generator=generator).to(dtype)


def gather_job(group, rank, name, case, dtype, overlap):
    (format, width, _), size = case, get_world_size(group)
    codec = CacheCodec(format, width, dtype)
    transport = plugins.load(plugins.TRANSPORTS, name)(group, overlap=overlap)
    shards = shards_of(size, width, dtype)
    mine = shards[rank].clone().requires_grad_()
    with Collectives() as forward:
        gathered = transport.gather(mine, codec=codec).wait()
    # Integers below 2**8, so that their sums over ranks are exact in bfloat16.
    weights = torch.arange(size * LOCAL)[None, :, None] + 1.0
    (gathered.float() * weights * (rank + 1)).sum().backward()

    whole = torch.cat(list(shards), dim=1)
    own = weights[:, rank * LOCAL : (rank + 1) * LOCAL] * size * (size + 1) / 2
    with torch.no_grad(), Collectives() as without_gradient:
        plain = transport.gather(shards[rank], codec=codec).wait()
    return {
        "values": torch.equal(gathered, codec.decode(codec.encode(whole))),
        "quantized": not torch.equal(gathered, whole),
        "dtype": gathered.dtype == mine.grad.dtype == dtype,
        "gradient": torch.equal(mine.grad.float(), own.expand(BATCH, LOCAL, width)),
        "without gradient": torch.equal(plain, gathered) and not plain.requires_grad,
        "of a leaf without": not transport.gather(shards[rank], codec=codec).wait().requires_grad,
        "same bytes": without_gradient.filled == forward.filled,
    }, forward.filled


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "overlap"), [(torch.bfloat16, True), (torch.float32, False)])
def test_codes_move_and_gradients_pass_them_as_they_are(ranks, name, size, case, dtype, overlap):
    code_bytes = size * BATCH * LOCAL * case[2]
    for answers, filled in ranks.run(gather_job, size, name, case, dtype, overlap):
        assert all(answers.values()), answers
        assert [(kind, count) for _, kind, count in filled] == (
            [(torch.uint8, code_bytes)] if size > 1 else []
        )
