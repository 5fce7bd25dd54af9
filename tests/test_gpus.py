# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nemo_dsv4_cp.gpus import (
    ASSUMED,
    NETWORK_SECONDS,
    NVLINK_SECONDS,
    Gpu,
    gpu_here,
)

# 80 GB/s get through NVLink, 8 through the network.
GPU = Gpu("none", 80, 1000, 100, kernel_share=0.5, nvlink_gbs=100, network_gbs=10)


def test_nothing_takes_no_time():
    assert GPU.gather_seconds(0, 64) == GPU.exchange_seconds(0, 64) == 0


def test_within_a_node_all_goes_over_nvlink():
    for seconds in (GPU.gather_seconds, GPU.exchange_seconds):
        assert seconds(8e9, 8) == pytest.approx(0.1 + NVLINK_SECONDS)


def test_what_is_exchanged_among_nodes_goes_over_the_network():
    assert GPU.exchange_seconds(8e9, 16) == pytest.approx(1 + NETWORK_SECONDS)


def test_a_gather_enters_a_node_once_over_all_its_adapters():
    # 56 of 63 shards are other nodes', an eighth of them for each adapter.
    assert GPU.gather_seconds(72e9, 64) == pytest.approx(1 + NETWORK_SECONDS)
    # With a network as fast as NVLink all shards still come over NVLink.
    even = Gpu("none", 80, 1000, 100, kernel_share=0.5, nvlink_gbs=100, network_gbs=100)
    assert even.gather_seconds(72e9, 64) == pytest.approx(0.9 + NETWORK_SECONDS)


def test_rates_are_shares_of_peaks():
    assert GPU.products_per_second == pytest.approx(700e12)
    assert GPU.float32_per_second == pytest.approx(70e12)
    assert GPU.kernels_per_second == pytest.approx(500e12)


@pytest.mark.parametrize(
    "name, known",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 3090", ASSUMED.name),
    ],
)
def test_a_device_is_found_by_a_word_of_its_name(monkeypatch, name, known):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert gpu_here().name == known


def test_without_a_gpu_rates_are_assumed():
    if not torch.cuda.is_available():
        assert gpu_here() is ASSUMED
