# SPDX-License-Identifier: Apache-2.0
import pytest

from nemo_dsv4_cp.sequence.schedule import COMPUTED_A_SECOND, MOVED_A_SECOND
from nemo_dsv4_cp.tools.gpus import (
    GPUS,
    LINK_SHARE,
    NETWORK_SECONDS,
    NVLINK_SECONDS,
    Gpu,
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
    assert GPU.products_a_second == pytest.approx(700e12)
    assert GPU.float32_a_second == pytest.approx(70e12)
    assert GPU.kernels_a_second == pytest.approx(500e12)


def test_plans_go_by_the_rates_that_balance_auto_goes_by():
    h100 = GPUS["h100"]
    assert h100.kernels_a_second == pytest.approx(COMPUTED_A_SECOND, rel=0.02)
    assert h100.network_gbs * 1e9 * LINK_SHARE == pytest.approx(MOVED_A_SECOND)
