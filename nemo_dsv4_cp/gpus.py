# SPDX-License-Identifier: Apache-2.0
"""Rates of GPUs and of the links between them: for ``plan``, ``bench`` and ``balance: auto``."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

PRODUCT_SHARE = 0.7
"""Share of a peak that matrix products reach: an H200's large bfloat16 ones about 790 of 989
TFLOP/s, experts' and other thin ones less."""

LINK_SHARE = 0.8
"""Share of a link that collectives reach: NCCL about 360 of NVLink 4's 450 GB/s, 40 of a network's
50."""

NVLINK_SECONDS = 30e-6
"""What a collective among the GPUs of a node takes whatever it moves: launch and handshake."""

NETWORK_SECONDS = 60e-6
"""The same among nodes: some hops more."""

NETWORK_GBS = 50.0
"""A 400 Gb/s adapter per GPU, as in the DGX and HGX systems of H100, H200 and B200."""

GPUS_A_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node of :data:`GPUS_A_NODE`, and its links.

    Attributes:
        name: As ``plan --gpu`` takes it.
        memory: GiB, as ``nvidia-smi`` shows them; the gigabytes of data sheets are nearly these.
        tflops: Dense bfloat16 peak, times 1e12 per second.
        float32_tflops: Float32 peak without TF32, which torch and AutoModel leave off.
        kernel_share: Share of the bfloat16 peak that attention and index scores reach.
        nvlink_gbs: GB/s that arrive from GPUs of the node, peak.
        network_gbs: GB/s that arrive from other nodes, peak.
    """

    name: str
    memory: float
    tflops: float
    float32_tflops: float
    kernel_share: float
    nvlink_gbs: float
    network_gbs: float = NETWORK_GBS

    @property
    def products_per_second(self) -> float:
        """Floating-point operations per second of bfloat16 matrix products."""
        return self.tflops * 1e12 * PRODUCT_SHARE

    @property
    def float32_per_second(self) -> float:
        """Floating-point operations per second of float32 matrix products."""
        return self.float32_tflops * 1e12 * PRODUCT_SHARE

    @property
    def kernels_per_second(self) -> float:
        """Floating-point operations per second of attention and index scores."""
        return self.tflops * 1e12 * self.kernel_share

    def gather_seconds(self, received: float, ranks: int) -> float:
        """Return how long ``ranks`` take to receive the same from all others, or a sum of theirs.

        Ranks are neighbors in a node. A node fetches each byte of other nodes once, each of its
        GPUs a share over its own adapter, and NVLink distributes it: NCCL's rings, whose bus
        bandwidth among nodes is that of all adapters together.
        """
        if not received:
            return 0.0
        nvlink = received / (self.nvlink_gbs * 1e9 * LINK_SHARE)
        if ranks <= GPUS_A_NODE:
            return nvlink + NVLINK_SECONDS
        of_other_nodes = received * (ranks - GPUS_A_NODE) / (ranks - 1)
        network = of_other_nodes / (GPUS_A_NODE * self.network_gbs * 1e9 * LINK_SHARE)
        return max(nvlink, network) + NETWORK_SECONDS

    def scatter_seconds(self, received: float, ranks: int) -> float:
        """Return how long ``ranks`` take to receive from each other what only they need.

        Nothing is shared or summed on its way: each GPU's own adapter brings what comes from other
        nodes.
        """
        if ranks <= GPUS_A_NODE:
            return self.exchange_seconds(received, ranks)
        return self.exchange_seconds(received * (ranks - GPUS_A_NODE) / (ranks - 1), ranks)

    def exchange_seconds(self, received: float, ranks: int) -> float:
        """Return how long ``ranks`` take to receive what each requests from one or two others.

        Among nodes the slowest rank's partner is in another, and all goes over the network.
        """
        if not received:
            return 0.0
        if ranks <= GPUS_A_NODE:
            return received / (self.nvlink_gbs * 1e9 * LINK_SHARE) + NVLINK_SECONDS
        return received / (self.network_gbs * 1e9 * LINK_SHARE) + NETWORK_SECONDS


_SXM = (
    Gpu("a100", 80, 312, 19.5, kernel_share=0.4, nvlink_gbs=300, network_gbs=25),
    Gpu("h100", 80, 989, 67, kernel_share=0.4, nvlink_gbs=450),
    Gpu("h200", 140, 989, 67, kernel_share=0.4, nvlink_gbs=450),
    Gpu("b200", 179, 2250, 75, kernel_share=0.3, nvlink_gbs=900),
)

GPUS = {gpu.name: gpu for gpu in _SXM}
"""SXM modules by name: data sheets, NVLink 3 to 5 one way. Attention of 512 wide heads that share
their keys: FlashMLA's sparse forward is published with 640 TFLOP/s on H800 (0.65 of its peak),
cuDNN's sparse backward with 500 to 690 on B200 (0.22 to 0.31). The shares here are a guess for the
Triton kernels of this package, which were not measured on any of these GPUs."""

KIB = 1 << 10

SHARED_MEMORY = {
    80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 103: 227 * KIB,
    120: 99 * KIB,
}  # fmt: skip
"""Bytes of shared memory that a block may have, by capability times 10 (CUDA programming guide)."""


@dataclass(frozen=True)
class Multiprocessors:
    """The SMs of one GPU, for models of a kernel's time.

    Attributes:
        gpu: Its entry of :data:`GPUS`.
        count: How many.
        products: Floating-point operations of dense bfloat16 products per cycle of one.
        memory_gbs: GB/s of the GPU's memory, peak.
        l2_bytes: Bytes that one reads of the L2 cache per cycle.
        shared_bytes: Bytes that one reads or writes of its shared memory per cycle.
        instructions: Instructions of warps that one issues per cycle.
        registers: Of 32 bits.
        threads: The most that it holds.
    """

    gpu: Gpu
    count: int
    products: int
    memory_gbs: float
    l2_bytes: float = 23.7
    shared_bytes: int = 128
    instructions: int = 4
    registers: int = 65536
    threads: int = 2048

    @property
    def cycles_per_second(self) -> float:
        """The clock at which the GPU reaches its peak."""
        return self.gpu.tflops * 1e12 / (self.count * self.products)


_B200 = Multiprocessors(GPUS["b200"], 148, 8192, 8000)

MULTIPROCESSORS = {
    80: Multiprocessors(GPUS["a100"], 108, 2048, 2039),
    90: Multiprocessors(GPUS["h100"], 132, 4096, 3350),
    100: _B200,
    103: _B200,
}
"""SMs by capability times 10: NVIDIA's architecture papers. An H100's SM was measured to read 23.7
bytes per cycle of its L2; the others are assumed to read as many. A B300 is taken for a B200."""

ASSUMED = GPUS["h100"]
"""Whose rates stand in for a GPU that the table lacks, and for a CPU."""


def known_gpu() -> Gpu | None:
    """Return the entry of this process's current CUDA device, None if there is none."""
    device = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return next((GPUS[word] for word in re.split(r"\W+", device) if word in GPUS), None)


def gpu_here() -> Gpu:
    """Return the entry of this process's current CUDA device, or :data:`ASSUMED`."""
    return known_gpu() or ASSUMED
