"""What a rank computes: multiply-adds, by counting what each query sees."""

# i position of a query   r compress ratio

from __future__ import annotations

from collections import Counter

from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, SequenceLayout, entries_seen
from nemo_dsv4_cp.tools.sizes import ModelSizes


def _at_most(end: int, ratio: int, limit: int) -> int:
    """Return the entries that queries 0 .. end-1 see, at most ``limit`` each."""
    reached = min(end, max(limit * ratio - 1, 0))
    return entries_seen(range(reached), ratio) + (end - reached) * limit


def work(sizes: ModelSizes, layout: SequenceLayout) -> int:
    """Return the multiply-adds of one rank's forward and backward of one row.

    Everything counts that a token passes: the projections of attention, the experts chosen for it,
    the language-model head, each forward once and backward twice; the keys a query sees, twice in
    forward and five times in backward; the indexer in forward alone. What the causal view hides
    does not count, padding at the end of the row does.

    Args:
        sizes: The model's sizes.
        layout: Positions of the rank.
    """
    s, tokens = sizes, layout.local_len
    per_head = s.num_attention_heads * s.head_dim
    experts = (s.num_experts_per_tok + s.n_shared_experts) * 3 * s.moe_intermediate_size
    out_width = s.o_groups * s.o_lora_rank
    # Raw keys: what is in the window, fewer for the row's first tokens.
    window = _at_most(layout.end, 1, s.sliding_window) - _at_most(layout.start, 1, s.sliding_window)
    total = 3 * tokens * s.hidden_size * s.vocab_size
    for ratio, layers in Counter(s.compress_ratios).items():
        linear = s.hidden_size * (s.q_lora_rank + s.head_dim + experts + out_width)
        linear += per_head * (s.q_lora_rank + s.o_lora_rank)
        seen, index = window, 0
        if ratio == OVERLAP_RATIO:
            linear += s.hidden_size * 4 * s.head_dim
            width = s.index_n_heads * s.index_head_dim
            index = tokens * s.hidden_size * (4 * s.index_head_dim + s.index_n_heads)
            index += tokens * s.q_lora_rank * width
            index += entries_seen(layout.own, ratio) * width
            limit = s.index_topk
            seen += _at_most(layout.end, ratio, limit) - _at_most(layout.start, ratio, limit)
        elif ratio:
            linear += s.hidden_size * 2 * s.head_dim
            seen += entries_seen(layout.own, ratio)
        total += layers * (3 * tokens * linear + 7 * seen * per_head + index)
    return total
