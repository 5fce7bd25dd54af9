# SPDX-License-Identifier: Apache-2.0
"""Top-k selection of DeepSeek-V4.1 against AutoModel's, and against loops where scores tie."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dsv4_cp.kernels.protocol import CandidateBlocks, RotatedIndexQueries
from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.kernels.reference.two_level_selection import index_scores
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries
from tests.examples import examples
from tests.kernels.cases import selections

HEADS, WIDTH = 16, 16  # fewer heads often have no positive product: scores of 0 tie
SCALE = WIDTH**-0.5 * HEADS**-0.5


@pytest.fixture
def indexer(monkeypatch):
    """Return what calls AutoModel's indexer with queries and keys that are ready."""
    attention = pytest.importorskip("nemo_automodel.components.models.deepseek_v41.attention")
    monkeypatch.setattr(attention, "_apply_rope", lambda values, angles: values)
    monkeypatch.setattr(attention, "quantize_cache", lambda values, **_: values)

    class Indexer(attention._Indexer):
        def __init__(self, topk, blocks, *, source, later):
            torch.nn.Module.__init__(self)
            self.attn_backend, self.owns_keys, self.topk = "eager", False, topk
            self.is_candidate_source, self.uses_candidates = source, later
            self.num_heads, self.head_dim = HEADS, WIDTH
            self.candidate_topk_blocks, self.candidate_block_size = blocks.keep, blocks.size
            self.wq_b = self.weights_proj = torch.nn.Identity()

    def select(tensors, ratio, documents=None, candidates=None, *, topk, blocks, source=False):
        q, weights, keys = tensors
        of_entries = complete = None
        if documents is not None:
            of_tokens = documents.unflatten(1, (-1, ratio))
            of_entries, complete = of_tokens[..., 0], (of_tokens > 0).all(-1)
        state = attention.DeepseekV41AttentionState(
            index_keys=keys, candidates=candidates, compression_ratio=ratio,
            compressed_seq_ids=of_entries, compressed_valid=complete,
        )  # fmt: skip
        angles = {"latent": None, "angles": None, "compressed_angles": None}
        module = Indexer(topk, blocks, source=source, later=candidates is not None)
        state = module(
            weights, query_latent=q.flatten(2), state=state, packed_seq_ids=documents, **angles
        )
        return state.topk_indices, state.candidates

    return select


def random(batch, length, entries, dtype=torch.float32):
    """Draw projected queries, weights without the scale, and keys."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, length, HEADS, WIDTH), (batch, length, HEADS), (batch, entries, WIDTH)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def select(tensors, plan, candidates=None, *, topk, blocks=None, workspace=1 << 20):
    """Select with the torch path; weights have the scale."""
    q, weights, keys = tensors
    return TorchKernels(workspace_bytes=workspace).select_shared(
        RotatedIndexQueries(q, weights, plan), keys, topk=topk, blocks=blocks,
        candidates_BLM=candidates,
    )  # fmt: skip


def in_order(selected):
    """Sort selected entries, which may come in any order."""
    return selected.long().sort(dim=-1).values


def as_mask(candidates, plan, blocks, entries):
    """Return which entries are visible and in candidates, bool [B, L, P]."""
    first, stop = (bound[..., None] for bound in plan.queries.visible_entries(plan.ratio, "cpu"))
    entry = torch.arange(entries)
    number = (entry - first).div(blocks.size, rounding_mode="floor")
    inside = (number[..., None] == candidates[:, :, None, :]).any(-1)
    return inside & (entry >= first) & (entry < stop)


def packed(lengths, ratio):
    """Return the layout of rows of documents, and each token's document, 0 for padding."""
    spans = torch.tensor([[-(-length // ratio) * ratio for length in row] for row in lengths])
    starts = spans.cumsum(1) - spans
    documents = torch.zeros(len(lengths), spans[0].sum(), dtype=torch.long)
    for row, (begins, of_row) in enumerate(zip(starts.tolist(), lengths, strict=True)):
        for number, (begin, length) in enumerate(zip(begins, of_row, strict=True), start=1):
            documents[row, begin : begin + length] = number
    layout = SequenceLayout.of_documents(starts, documents.shape[1], cp_rank=0, cp_size=1)
    return layout, documents


@pytest.mark.parametrize("lengths", [[40], [41, 41], [[3, 9, 28]], [[7, 34], [25, 16]]])
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("keep", [2, 50])
def test_selects_what_automodel_selects(lengths, ratio, keep, indexer):
    layout, documents = SequenceLayout(lengths[0]), None
    if isinstance(lengths[0], list):
        layout, documents = packed(lengths, ratio)
    total, entries = layout.seq_len, layout.seq_len // ratio
    real = torch.ones(len(lengths), total).bool() if documents is None else documents > 0
    plan = AttentionPlan(Queries.own(layout), 1, ratio)
    q, weights, keys = random(len(lengths), total, entries)
    options = {"topk": 5, "blocks": CandidateBlocks(keep, 4)}

    def both(q, theirs, mine, **options):
        """Select with AutoModel's candidates and ours; the selected entries are equal."""
        expected, theirs = indexer((q, weights, keys), ratio, documents, theirs, **options)
        options.pop("source", None)
        selected, mine = select((q, weights * SCALE, keys), plan, mine, **options)
        assert torch.equal(in_order(selected)[real], in_order(expected)[real])
        return theirs, mine

    theirs, mine = both(q, None, None, source=True, **options)
    assert torch.equal(as_mask(mine, plan, options["blocks"], entries)[real], theirs[real])
    assert both(q.flip(1), theirs, mine, **options)[1] is None
    expected, _ = indexer((q, weights, keys), ratio, documents, **options)
    selected, none = select((q, weights * SCALE, keys), plan, topk=5)
    assert torch.equal(in_order(selected)[real], in_order(expected)[real]) and none is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_automodel_bit_by_bit(dtype, indexer, monkeypatch):
    from nemo_automodel.components.models.deepseek_v41 import attention

    seen = []
    choose = attention._select_candidate_blocks
    monkeypatch.setattr(
        attention,
        "_select_candidate_blocks",
        lambda scores, *args, **options: seen.append(scores) or choose(scores, *args, **options),
    )
    tensors = q, weights, keys = random(2, 33, 33, dtype)
    indexer(tensors, 1, topk=3, blocks=CandidateBlocks(2, 4), source=True)
    expected, scores = seen[0], index_scores(q, keys, weights * SCALE)
    assert scores.dtype == dtype
    assert torch.equal(scores.masked_fill(expected.isinf(), -torch.inf), expected)


def selected_by_loops(scores, plan, topk, blocks, candidates):
    """Return the entries of each query in each row, and the candidates that it chooses."""
    selected, chosen = [], []
    ranges = torch.stack(plan.queries.visible_entries(plan.ratio, "cpu"), dim=-1)
    for row, of_row in enumerate(ranges.expand(len(scores), -1, -1).tolist()):
        for query, (first, stop) in enumerate(of_row):
            of, seen = scores[row, query, first:stop].tolist(), range(stop - first)
            if candidates is not None:
                inside = candidates[row, query].tolist()
                seen = [entry for entry in seen if entry // blocks.size in inside]
            elif blocks is not None:
                best = [max(of[begin : begin + blocks.size]) for begin in seen[:: blocks.size]]
                best[-1:] = [float("inf")] * len(best[-1:])
                ranked = sorted(range(len(best)), key=lambda block: (-best[block], block))
                chosen.append(ranked[: blocks.keep])
            ranked = sorted(seen, key=lambda entry: (-of[entry], entry))
            selected.append([first + entry for entry in ranked[:topk]])
    return selected, chosen if blocks is not None and candidates is None else None


@settings(max_examples=examples(fixed=50, random=50, many=5000))
@given(
    selections(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.one_of(st.none(), st.builds(CandidateBlocks, st.integers(1, 6), st.integers(1, 9))),
)
def test_selects_the_best_ties_by_place_in_any_workspace(case, dtype, blocks):
    tensors, _, options, workspace = case
    q, weights, keys = (tensor.to(dtype) for tensor in tensors)
    plan, topk = options["plan"], options["topk"]

    def check(q, candidates):
        found = select(
            (q, weights, keys), plan, candidates, topk=topk, blocks=blocks, workspace=workspace
        )
        scores = index_scores(q, keys, weights).float()
        for mine, expected in zip(
            found, selected_by_loops(scores, plan, topk, blocks, candidates), strict=True
        ):
            if mine is None or expected is None:
                assert mine is expected
                continue
            assert mine.dtype == torch.int32
            for row, best in zip(mine.flatten(0, 1).tolist(), expected, strict=True):
                assert row == best + [NOTHING] * (len(row) - len(best))
        assert found[0].shape[2] == min(topk, keys.shape[1])
        return found[1]

    candidates = check(q, None)
    if blocks is not None:
        check(q.flip(1), candidates)


def test_a_row_too_short_for_an_entry_selects_nothing():
    plan = AttentionPlan(Queries.own(SequenceLayout(1)), 1, 2)
    found = select(random(2, 1, 0), plan, topk=3, blocks=CandidateBlocks(2, 4))
    assert [result.shape for result in found] == [(2, 1, 0)] * 2
    selected, none = select(random(2, 1, 0), plan, found[1], topk=3, blocks=CandidateBlocks(2, 4))
    assert selected.shape == (2, 1, 0) and none is None


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes alive at most, besides ``known`` tensors."""

    def __init__(self, known):
        super().__init__()
        self.live = self.peak = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._alive:
                self._alive.add(storage._cdata)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return out

    def _free(self, key, size):
        self._alive.discard(key)
        self.live -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("topk", [16, 4096])
def test_memory_stays_within_the_workspace(dtype, packed, topk):
    workspace, length, ranks = 1 << 20, 64, 32
    layout = SequenceLayout(length, ranks - 1, ranks)
    if packed:
        starts = torch.tensor([[0, 200], [0, length * ranks - 30]])
        layout = SequenceLayout.of_documents(starts, length, cp_rank=ranks - 1, cp_size=ranks)
    plan = AttentionPlan(Queries.own(layout), 1, 1)
    tensors = random(2, length, layout.seq_len, dtype)
    plan.queries.visible_entries(1, torch.device("cpu"))  # shared by all layers
    options = {"topk": topk, "blocks": CandidateBlocks(64, 8), "workspace": workspace}
    with Peak(tensors) as source:
        selected, candidates = select(tensors, plan, **options)
    with Peak([*tensors, candidates]) as later:
        select(tensors, plan, candidates, **options)
    results = sum(result.nbytes for result in (selected, candidates))
    assert source.peak - results < workspace < 16 * length * layout.seq_len
    assert later.peak - selected.nbytes < workspace
