"""Packed rows over real gloo ranks: every document is as if it ran alone at CP size 1."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.packed_parity import packed_attention_job, packed_model_job
from tests.parity import assert_parity

TRANSPORTS = ["all_gather", "boundary"]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_a_layer_keeps_documents_apart(ranks, transport, ratio, size):
    documents = [[1, 300, 3, 130, 4, 129], [513, 54]]
    assert_parity(ranks.run(packed_attention_job, size, ratio, documents, {"transport": transport}))


def window_job(group, rank, ratio, documents, options, recompute, seed, spare, window):
    return packed_attention_job(
        group, rank, ratio, documents, options, recompute, seed, spare, sliding_window=window
    )


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    transport=st.sampled_from(TRANSPORTS),
    size=st.sampled_from([2, 3, 4]),
    ratio=st.sampled_from([0, 4, 4, 16]),
    documents=st.lists(
        st.lists(st.one_of(st.integers(1, 12), st.integers(1, 90)), min_size=1, max_size=6),
        min_size=1,
        max_size=2,
    ),
    window=st.integers(1, 40),
    recompute=st.booleans(),
    spare=st.integers(0, 5),
    workspace_mib=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_any_documents_stay_apart(
    ranks, transport, size, ratio, documents, window, recompute, spare, workspace_mib, seed
):
    options = {"transport": transport, "workspace_mib": workspace_mib}
    arguments = (ratio, documents, options, recompute, seed, spare, window)
    assert_parity(ranks.run(window_job, size, *arguments))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("mtp_layers", [0, 2])
def test_a_moe_model_keeps_documents_apart(ranks, size, mtp_layers):
    documents = [[70, 5, 140, 1], [216]]
    options = {"transport": "boundary"}
    assert_parity(
        ranks.run(packed_model_job, size, [0, 4, 128, 4], documents, options, 0, mtp_layers)
    )
