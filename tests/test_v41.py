# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4.1 over real gloo ranks against AutoModel's model at CP size 1."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.parity import assert_parity, cpu_backend, randomise

pytest.importorskip("nemo_automodel.components.models.deepseek_v41")
from nemo_dsv4_cp.model_v41 import DeepseekV41ContextParallelForCausalLM
from tests.exchange.late import late_job
from tests.parity_v41 import attention_chain_job, balance_job, model_job, tiny_config

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        (2, [40, 57]),
        (5, [61]),
        *(pytest.param(size, [40, 57], marks=SLOW) for size in (1, 3, 5)),
        *(pytest.param(size, [61], marks=SLOW) for size in (1, 2, 3)),
    ],
)
def test_rows_of_one_document_equal_automodels_at_one_rank(ranks, size, rows):
    assert_parity(ranks.run(model_job, size, rows, {}))


@pytest.mark.parametrize(
    ("size", "recompute"),
    [
        (1, False),
        (2, False),
        (4, True),
        *(pytest.param(size, True, marks=SLOW) for size in (1, 2, 3)),
        *(pytest.param(size, False, marks=SLOW) for size in (3, 4)),
    ],
)
def test_packed_documents_equal_automodels_at_one_rank(ranks, size, recompute):
    documents = [[1, 30, 7, 24], [55, 4]]
    assert_parity(ranks.run(model_job, size, documents, {}, 0, recompute))


@pytest.mark.parametrize("size", [1, 2])
def test_selective_checkpointing_hands_out_what_it_saved(ranks, size):
    assert_parity(ranks.run(model_job, size, [[1, 30, 7, 24], [55, 4]], {}, 0, "selective"))


@pytest.mark.parametrize(("size", "balance"), [(1, "off"), (2, "on"), (3, "off"), (3, "on")])
def test_quantised_keys_and_choices_are_automodels(ranks, size, balance):
    documents = [[1, 30, 7, 24], [55, 4], [64]]
    for found in ranks.run(attention_chain_job, size, documents, {"balance": balance}):
        assert found["outputs"] < 1e-5
        # Bit by bit: the matrix products of a token are the same whatever rows surround it.
        assert found["entries"] == found["index keys"] == found["selected"] == 0


@pytest.mark.parametrize(
    ("size", "rows", "options", "recompute"),
    [
        (2, [40], {"transport": "all_gather"}, True),
        (3, [[1, 30, 7, 40]], {"keep_index_choice": False}, True),
        (4, [[25, 4, 35], [64]], {"overlap": False}, "selective"),
    ],
)
def test_a_step_is_the_same_bit_by_bit_whoever_selects(ranks, size, rows, options, recompute):
    made = 5 + 1  # by five layers, one of which chooses candidates, too
    for off, on in ranks.run(balance_job, size, rows, options, recompute):
        assert torch.equal(on.logits, off.logits)
        assert (
            len(on.chosen)
            == len(off.chosen)
            == made * (1 if options.get("keep_index_choice", True) else 2)
        )
        assert all(map(torch.equal, on.chosen, off.chosen))
        assert on.gradients.keys() == off.gradients.keys()
        for name, gradient in off.gradients.items():
            assert torch.equal(on.gradients[name], gradient), name


@pytest.mark.parametrize(("rows", "at_most"), [([128], 1.01), ([[100, 28]], 1.1)])
def test_ranks_score_about_as_many_entries(ranks, rows, at_most):
    def largest_over_mean(trained, ratio):
        scored = [each.scored[ratio] for each in trained]
        return max(scored) * len(scored) / sum(scored)

    off, on = zip(*ranks.run(balance_job, 4, rows, {}), strict=True)
    for ratio in (1, 2):
        assert largest_over_mean(off, ratio) > 1.4
        assert largest_over_mean(on, ratio) < at_most
        assert sum(each.scored[ratio] for each in on) == sum(each.scored[ratio] for each in off)


@pytest.mark.parametrize("transport", ["all_gather", "boundary"])
def test_layers_that_select_for_others_read_nothing_that_may_not_be_there(ranks, transport):
    options = {"balance": "on", "transport": transport}
    documents = [[1, 30, 7, 24], [55, 4]]
    for found in ranks.run(late_job, 3, attention_chain_job, "wait", documents, options):
        assert found["outputs"] < 1e-5
        assert found["selected"] == 0


OF_OTHER_RATIOS = {
    "compress_ratios": [3, 3, 0, 2, 2, 3, 3, 0],
    "kv_source_layer_ids": [0, 3, 5],
    "index_source_layer_ids": [0, 1, 3, 5, 6],
    "candidate_source_layer_id": -1,
}


@pytest.mark.parametrize(
    ("size", "rows", "changes"),
    [
        (4, [8], {}),  # an n-gram of 4 tokens lies on three ranks
        (5, [[2, 3], [4]], {}),  # ranks of padding alone
        (2, [[20, 13], [9]], {"num_hidden_layers": 4}),  # its lists name more layers
        (3, [[30, 9, 5], [7]], OF_OTHER_RATIOS),
    ],
)
def test_unusual_shards_and_layers_equal_automodels(ranks, size, rows, changes):
    assert_parity(ranks.run(changed_job, size, rows, {}, 0, True, changes))


SOURCES = st.sampled_from(
    [
        # Ratios, sources of entries, layers that select, the one that chooses candidates.
        ([0, 2, 2, 1, 1], [1, 3], [1, 3, 4], 3),
        ([0, 0, 2, 2, 1, 1], [2, 4], [2, 3, 4, 5], 4),
        ([1, 1, 1, 0, 1], [0], [0, 2, 4], 0),
        ([2, 2, 0, 2, 2], [0, 3], [0, 1, 3], -1),
    ]
)


# No shrinking: after a failed case the workers start anew, which takes seconds.
@settings(
    max_examples=examples(fixed=6, random=60, many=200),
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    size=st.sampled_from([1, 2, 3, 4, 5]),
    sources=SOURCES,
    documents=st.one_of(
        st.lists(st.integers(2, 70), min_size=1, max_size=2),
        st.lists(
            st.lists(
                st.one_of(st.integers(1, 8), st.integers(2, 50)), min_size=1, max_size=5
            ).filter(
                lambda lengths: max(lengths) > 1  # or there is no target
            ),
            min_size=1,
            max_size=2,
        ),
    ),
    engram=st.booleans(),
    transport=st.sampled_from(["boundary", "all_gather"]),
    balance=st.sampled_from(["on", "on", "off"]),
    overlap=st.booleans(),
    recompute=st.sampled_from([False, True, "selective"]),
    keep=st.booleans(),
    window=st.integers(1, 20),
    topk=st.integers(1, 12),
    blocks=st.integers(1, 6),
    block=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_model_equals_automodels(
    ranks, size, sources, documents, engram, transport, balance, overlap, recompute, keep, window,
    topk, blocks, block, seed,
):  # fmt: skip
    ratios, kv_sources, index_sources, candidates = sources
    options = {"transport": transport, "overlap": overlap, "keep_index_choice": keep}
    options |= {"balance": balance}
    changes = {
        "compress_ratios": ratios,
        "num_hidden_layers": len(ratios),
        "kv_source_layer_ids": kv_sources,
        "index_source_layer_ids": index_sources,
        "candidate_source_layer_id": candidates,
        "candidate_topk_blocks": blocks,
        "candidate_block_size": block,
        "index_topk": topk,
        "sliding_window": window,
    }
    changes |= (
        {"engram_layer_ids": [1, 3]}
        if engram
        else {
            "engram_layer_ids": [],
            "engram_num_embeddings": [],
        }
    )
    assert_parity(ranks.run(changed_job, size, documents, options, seed, recompute, changes))


def changed_job(group, rank, documents, options, seed, recompute, changes):
    return model_job(group, rank, documents, options, seed, recompute, **changes)


def test_candidates_of_entries_that_are_replaced_are_refused():
    with pytest.raises(ValueError, match="candidate_source_layer_id=1 is followed by layer 3"):
        tiny_config({}, candidate_source_layer_id=1)


def test_the_precision_of_v4s_compressors_is_refused():
    with pytest.raises(ValueError, match="compressor_precision=bf16x3 is not supported"):
        tiny_config({"compressor_precision": "bf16x3"})


def test_a_loss_of_the_indexer_is_refused():
    with pytest.raises(ValueError, match=r"coefficient=0\.1 is not supported with DeepSeek-V4\.1"):
        tiny_config({"indexer_loss": {"coefficient": 0.1}})


ROWS = torch.full((2, 8), 5)
COUNTED = torch.arange(8).expand(2, -1)


@pytest.fixture(scope="module")
def small_model():
    config = tiny_config({}, engram_layer_ids=[], engram_num_embeddings=[])
    model = DeepseekV41ContextParallelForCausalLM(config, backend=cpu_backend())
    randomise(model, 0)
    return model.eval()


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ({"attention_mask": (COUNTED > 2).long()}, "real tokens after padding"),
        ({"attention_mask": (COUNTED != 3).long()}, "real tokens after padding"),
        ({"attention_mask": torch.full((2, 8), 2)}, "attention_mask holds 2"),
        ({"attention_mask": torch.ones(2, 9)}, r"attention_mask is float32 \[2, 9\]"),
        ({"attention_mask": torch.ones(2, 1, 8, 8)}, "attention_mask is"),
        ({"position_ids": COUNTED % 4}, "position_ids do not count"),
        ({"position_ids": COUNTED + 1}, "position_ids do not count"),
        ({"position_ids": COUNTED[0]}, r"position_ids is int64 \[8\]"),
        ({"input_ids": ROWS[:, :0]}, "no token in a row"),
    ],
)
def test_rows_that_no_sharder_checked_are_refused_at_cp_size_one(small_model, rows, text):
    with pytest.raises(ValueError, match=text):
        small_model(**{"input_ids": ROWS} | rows)


def test_one_mask_and_positions_for_all_rows_count_as_a_mask_per_row(small_model):
    mask = (COUNTED < 6).long()
    expected = small_model(ROWS, mask, COUNTED).logits
    found = small_model(ROWS, mask[:1], COUNTED[:1]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
