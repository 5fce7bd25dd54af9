"""What a context-parallel size costs each rank, by arithmetic alone: no GPU, no process group.

Bytes and memory are sums of named tensors, as ``bench bytes`` and ``bench memory`` weigh them.
"""

# B batch rows   S global tokens, padded   L local tokens (S / R)   R CP ranks   W sliding window
# N attention heads   D head_dim   E hidden size   I index heads   r compress ratio
# P compressed entries (S / r)   K selected entries   T raw keys that a rank addresses
# A query rank (q_lora_rank)   G output groups times their rank   C queries of a chunk

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from nemo_dsv4_cp.sequence.layout import (
    OVERLAP_RATIO,
    SequenceLayout,
    local_seq_multiple,
    padded_seq_len,
)

HOST = "host"
"""Name of AutoModel's own path."""
BOUNDARY = "boundary"
ALL_GATHER = "all_gather"
TRANSPORTS = (BOUNDARY, ALL_GATHER)
PATHS = (BOUNDARY, ALL_GATHER, HOST)
MODELS = ("v4_flash", "v4_pro")
"""Models whose sizes the package holds."""

GIB = 1 << 30
_BF16, _FP32, _INT32 = 2, 4, 4
_WORKSPACE_BYTES = 256 << 20
"""``context_parallel.workspace_mib`` as the package sets it."""


@dataclass(frozen=True)
class ModelSizes:
    """The fields of a ``DeepseekV4Config`` that costs depend on, under its names.

    Attributes:
        compress_ratios: One ratio for each of ``num_hidden_layers`` layers, without MTP's.
    """

    compress_ratios: tuple[int, ...]
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    sliding_window: int
    hc_mult: int
    moe_intermediate_size: int
    num_experts_per_tok: int
    n_shared_experts: int
    vocab_size: int
    max_position_embeddings: int

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> ModelSizes:
        """Take the sizes out of a config's fields.

        Raises:
            ValueError: If a field is missing or is no size.
        """
        wanted = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in wanted if fields.get(name) is None]
        if missing:
            raise ValueError(
                f"the model's fields lack {', '.join(missing)}; give a complete DeepSeek-V4 "
                f"config, or one of {', '.join(MODELS)}"
            )
        for name in wanted[1:]:
            value = fields[name]
            if type(value) is not int or value < (0 if name == "n_shared_experts" else 1):
                raise ValueError(f"{name}={value!r} is not a size; use a whole number from 1")
        ratios, layers = fields["compress_ratios"], fields["num_hidden_layers"]
        if not isinstance(ratios, Sequence) or isinstance(ratios, str):
            raise ValueError(f"compress_ratios={ratios!r} is not a list; use one ratio a layer")
        for ratio in ratios:
            if type(ratio) is not int or ratio < 0:
                raise ValueError(f"compress_ratios holds {ratio!r}; use 0, 4 or 128 for each layer")
        if len(ratios) < layers:
            raise ValueError(
                f"compress_ratios holds {len(ratios)} ratios for num_hidden_layers={layers}; give "
                "one a layer"
            )
        sizes = {name: fields[name] for name in wanted[1:]}
        return cls(compress_ratios=tuple(ratios[:layers]), **sizes)


def read_model_fields(source: str) -> dict[str, Any]:
    """Read a model's config fields.

    Args:
        source: One of :data:`MODELS`, or the path of a config.json or YAML file whose fields stand
            at the top, under ``config`` or under ``model.config``.

    Raises:
        ValueError: If there is no such file or no such fields in it.
    """
    if source in MODELS:
        text = (files("nemo_dsv4_cp.configs") / "model" / f"{source}.yaml").read_text("utf-8")
    else:
        try:
            text = Path(source).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"model {source!r} cannot be read; use {' or '.join(MODELS)}, or the path of a "
                "config.json or YAML file"
            ) from error
    try:
        # YAML's own reading of JSON would take 1e-06 for text.
        tree = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        message = f"model {source!r} is neither JSON nor YAML; give a model's config"
        raise ValueError(message) from error
    for step in (None, "model", "config"):
        if step is not None and isinstance(tree, dict) and isinstance(tree.get(step), dict):
            tree = tree[step]
        if isinstance(tree, dict) and "compress_ratios" in tree:
            return tree
    raise ValueError(
        f"model {source!r} names no compress_ratios, at the top, under config or under "
        "model.config; give a DeepSeek-V4 config"
    )


@dataclass(frozen=True)
class Shape:
    """A batch and how it is cut.

    Attributes:
        layout: Positions of the last rank, which sees the most.
        batch: B, rows.
    """

    layout: SequenceLayout
    batch: int = 1

    @property
    def ranks(self) -> int:
        """R, number of CP ranks."""
        return self.layout.cp_size

    @property
    def halo(self) -> int:
        """Tokens before the last rank's shard."""
        return self.layout.start


def received_bytes(sizes: ModelSizes, shape: Shape, ratio: int, path: str) -> tuple[int, int]:
    """Return what other ranks send to one layer of a rank with neighbours on both sides.

    Args:
        sizes: The model's sizes; activations are bfloat16, compressor features float32.
        shape: The batch and how it is cut.
        ratio: The layer's compress ratio.
        path: One of :data:`PATHS`.

    Returns:
        Bytes in forward and in backward, whatever algorithm carries them. Backward carries
        nothing of the indexer, which takes no gradient. A checkpointed layer's recomputation
        repeats the forward's, less the indexer's.
    """
    width, index_width = sizes.head_dim, sizes.index_head_dim
    if shape.ranks == 1:
        return 0, 0
    remote = shape.batch * (shape.layout.seq_len - shape.layout.local_len)  # tokens
    overlaps = ratio == OVERLAP_RATIO
    # Finished entries [P, D], and for CSA index keys, of the other ranks.
    both = (remote // ratio) * width * _BF16 if ratio else 0
    index_only = (remote // ratio) * index_width * _BF16 if overlaps else 0
    if path == BOUNDARY:
        window = shape.batch * min(sizes.sliding_window - 1, shape.halo)
        both += window * width * _BF16
        # A window's predecessor: values and gates of its half, [r, 2 D] float32.
        before, halves = shape.batch * ratio, 2
    else:
        both += remote * width * _BF16  # every raw key
        # The values and gates of every token: the overlapping half [S, 2 D] with all_gather,
        # both halves [S, 4 D] on the host's path.
        before, halves = remote, 2 if path == ALL_GATHER else 4
    if overlaps:
        both += before * halves * width * _FP32
        index_only += before * halves * index_width * _FP32
    return both + index_only, both


def attention_bytes(sizes: ModelSizes, shape: Shape, ratio: int, path: str) -> int:
    """Return the peak memory of one attention layer's forward and backward on the last rank.

    Its tensors at each of the moments where the peak may lie; parameters and input count where an
    operation keeps a view of them, as ``bench memory`` counts them. The host's is of its TileLang
    kernels.

    Args:
        sizes: The model's sizes; activations are bfloat16, compressor features float32.
        shape: The batch and how it is cut.
        ratio: The layer's compress ratio.
        path: One of :data:`PATHS`.

    Returns:
        Bytes.
    """
    s, tokens, rows = sizes, shape.batch * shape.layout.local_len, shape.batch
    row_tokens = rows * shape.layout.seq_len
    compresses, overlaps = ratio > 0, ratio == OVERLAP_RATIO
    out_width = s.o_groups * s.o_lora_rank

    per_head = tokens * s.num_attention_heads * s.head_dim * _BF16  # [L, N, D]
    hidden = tokens * s.hidden_size * _BF16  # [L, E]
    low_rank = tokens * s.q_lora_rank * _BF16  # [L, A]
    key = tokens * s.head_dim * _BF16  # [L, D]
    lse = tokens * s.num_attention_heads * _FP32  # [L, N]
    grouped = tokens * out_width * _BF16  # [L, G], the output between its two projections

    wq_b = s.q_lora_rank * s.num_attention_heads * s.head_dim * _BF16
    wo_a = s.num_attention_heads * s.head_dim * s.o_lora_rank * _BF16
    wo_b = out_width * s.hidden_size * _BF16
    inward = s.hidden_size * (s.q_lora_rank + s.head_dim) * _BF16  # wq_a, wkv
    weights = wq_b + wo_a + wo_b + inward

    # Features of a token: values and gates, float32, D wide each, twice that where windows overlap.
    feature_width = (4 if overlaps else 2) * s.head_dim
    compressor = feature_width * s.hidden_size * _FP32 if compresses else 0  # wkv, wgate
    entry_count = row_tokens // ratio if compresses else 0
    entries = entry_count * s.head_dim  # [P, D]
    selected = min(s.index_topk, shape.layout.seq_len // ratio) if overlaps else 0

    if path == HOST:
        # The mask before it is one: int64 positions' difference and two bools, [L, S] each. (At
        # R = 1 the host builds it from [S, S] tensors of the same order.)
        elements = tokens * shape.layout.seq_len
        mask = elements * (8 + 1 + 1)
        # Backward through the per-head norm: six float32 [N, L, D]; then what the layer holds.
        held = 3 * hidden + 2 * low_rank + key + weights + wo_a + wo_b
        norm = 6 * per_head * _FP32 // _BF16 + held + compressor * 2 + (hidden if compresses else 0)
        # Forward at ratio 4: masks [L, S], [L, P] and both joined; four [L, N, D], one in float32.
        masks = 2 * (elements + tokens * shape.layout.seq_len // ratio) * _BF16 if overlaps else 0
        features = tokens * (s.hidden_size + 2 * feature_width) * _FP32
        joined = masks + 6 * per_head + held + features if overlaps else 0
        return max(mask, norm, joined)

    if path == ALL_GATHER and shape.ranks > 1:
        raw = rows * (shape.layout.seq_len + s.sliding_window - 1) * s.head_dim  # [T, D]
    else:
        raw = (tokens + rows * (s.sliding_window - 1)) * s.head_dim

    # Between forward and backward: queries before their norm and after it, and the output.
    saved = 3 * per_head + grouped + 2 * hidden + 2 * low_rank + 2 * key + lse
    saved += weights + raw * _BF16
    if compresses:
        saved += compressor + tokens * s.hidden_size * _FP32  # the hidden states, in float32
        # What pooling multiplies, values and softmax: [n, 2 r, D] each with overlap, else the
        # features [L, 2 D] and [n, r, D].
        saved += (4 if overlaps else 3) * tokens * s.head_dim * _FP32
        saved += entries * _BF16 + tokens * selected * _INT32

    # 1. Backward through the output's projections: its gradient beside it.
    leaving = saved + per_head + hidden + wo_a + wo_b

    # 2. Backward of the attention: the output is gone; its gradient turned back, the queries'
    # gradient and the keys' in float32, then either a chunk's scores or the keys' in bfloat16.
    chunk = _chunk_bytes(sizes, shape, ratio, selected)
    grads = (raw + entries) * _FP32 + max(chunk, (raw + entries) * _BF16)
    attending = saved - grouped + per_head + hidden + wo_a + wo_b + grads

    # 3. Backward through the queries' norm: they and two gradients, four float32 chunks of rows;
    # the compressor has been through, its weights' gradients are there.
    norm_rows = min(per_head * _FP32 // _BF16, _WORKSPACE_BYTES)
    held = 4 * hidden + 2 * low_rank + lse + weights + wo_a + wo_b + inward + compressor * 2
    norming = 3 * per_head + 4 * norm_rows + held
    peak = max(leaving, attending, norming)

    # 4. Backward of a gather of the overlapping half's features [S, 2 D] float32: their gradient,
    # the same cut by rank; the queries and their gradient and the raw keys' in bfloat16.
    if path == ALL_GATHER and overlaps and shape.ranks > 1:
        gathered = 2 * row_tokens * 2 * s.head_dim * _FP32
        local = tokens * (s.hidden_size + feature_width) * _FP32
        held = 3 * hidden + 2 * low_rank + lse + weights + wo_a + wo_b + compressor
        peak = max(peak, gathered + raw * _BF16 + 2 * per_head + local + held)
    return peak


def _chunk_bytes(sizes: ModelSizes, shape: Shape, ratio: int, selected: int) -> int:
    """Return what backward of the attention holds for one chunk of queries."""
    heads, width = shape.batch * sizes.num_attention_heads, sizes.head_dim
    if selected:  # sparse_attention.py counts the copied entries like scores
        seen = selected * (1 + width // sizes.num_attention_heads)
    else:
        seen = shape.layout.seq_len // ratio if ratio else 0
    window = 2 * sizes.sliding_window
    rows = _WORKSPACE_BYTES // (4 * heads * (window + seen) * _FP32)
    rows = max(1, min(rows, sizes.sliding_window, shape.layout.local_len))
    # Scores, probabilities, their gradients: five [C, N, W + entries]; for CSA, chosen entries
    # [C, K, D] and their gradient in bfloat16 and in float32.
    scores = 5 * rows * heads * (window + (selected or seen)) * _FP32
    return scores + rows * shape.batch * selected * width * (_BF16 + _BF16 + _FP32)


def _windows_complete(end: int, ratio: int) -> int:
    """Return the sum over queries 0 .. end-1 of the entries each sees, (i + 1) // ratio."""
    full, rest = divmod(end, ratio)
    return ratio * full * (full - 1) // 2 + full * (rest + 1)


def _at_most(end: int, ratio: int, limit: int) -> int:
    """Return the same sum with at most ``limit`` for each query."""
    reached = min(end, max(limit * ratio - 1, 0))
    return _windows_complete(reached, ratio) + (end - reached) * limit


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
            scored = _windows_complete(layout.end, ratio) - _windows_complete(layout.start, ratio)
            index += scored * width
            limit = s.index_topk
            seen += _at_most(layout.end, ratio, limit) - _at_most(layout.start, ratio, limit)
        elif ratio:
            linear += s.hidden_size * 2 * s.head_dim
            seen += _windows_complete(layout.end, ratio) - _windows_complete(layout.start, ratio)
        total += layers * (3 * tokens * linear + 7 * seen * per_head + index)
    return total


@dataclass(frozen=True)
class PathCost:
    """What one path costs a rank.

    Attributes:
        path: One of :data:`PATHS`.
        received_bytes: What other ranks send it in a step, all layers, forward and backward.
        attention_bytes: Peak of the worst layer's attention, forward and backward.
    """

    path: str
    received_bytes: int
    attention_bytes: int


@dataclass(frozen=True)
class Row:
    """One context-parallel size.

    Attributes:
        cp_size: R, number of CP ranks.
        shard_len: L, tokens on each rank.
        padding: Padding tokens as a share of the padded row.
        idle_ranks: Ranks that hold nothing but padding.
        costs: One for each of :data:`PATHS`.
        stream_bytes: The checkpointed layer inputs, [L, hc_mult, E] bfloat16 each.
        imbalance: Work of the last rank, as a multiple of the first's.
        needed_bytes: Attention with the chosen transport, layer inputs, and what is reserved.
        fits: Whether a GPU holds that.
    """

    cp_size: int
    shard_len: int
    padding: float
    idle_ranks: int
    costs: tuple[PathCost, ...]
    stream_bytes: int
    imbalance: float
    needed_bytes: int
    fits: bool

    def of(self, path: str) -> PathCost:
        """Return what ``path`` costs."""
        return next(cost for cost in self.costs if cost.path == path)


@dataclass(frozen=True)
class Request:
    """What a plan is made for.

    Attributes:
        sizes: The model's sizes.
        seq_len: Tokens in a row, before padding.
        ranks: Number of GPUs.
        batch: B, rows.
        transport: The plugin's transport whose memory must fit.
        gpu_memory: Memory of a GPU, in GiB.
        reserved: What weights, optimizer state and experts take of it, in GiB.
    """

    sizes: ModelSizes
    seq_len: int
    ranks: int
    batch: int = 1
    transport: str = BOUNDARY
    gpu_memory: float = 80.0
    reserved: float = 40.0


def powers_of_two(ranks: int) -> list[int]:
    """Return 1, 2, 4, ... up to ``ranks``."""
    return [1 << power for power in range(ranks.bit_length())]


def row(request: Request, cp_size: int) -> Row:
    """Return what ``cp_size`` ranks a row cost.

    Args:
        request: What the plan is made for.
        cp_size: R, number of CP ranks.
    """
    sizes, batch = request.sizes, request.batch
    multiple = local_seq_multiple(sizes.compress_ratios)
    padded = padded_seq_len(request.seq_len, cp_size=cp_size, pad_multiple=multiple)
    first, last = (
        SequenceLayout.of_padded(padded, cp_rank=rank, cp_size=cp_size) for rank in (0, cp_size - 1)
    )
    shape, ratios = Shape(last, batch), Counter(sizes.compress_ratios)
    costs = tuple(
        PathCost(
            path,
            sum(n * sum(received_bytes(sizes, shape, ratio, path)) for ratio, n in ratios.items()),
            max(attention_bytes(sizes, shape, ratio, path) for ratio in ratios),
        )
        for path in PATHS
    )
    length = last.local_len
    stream = batch * length * sizes.hc_mult * sizes.hidden_size * _BF16 * sizes.num_hidden_layers
    attention = next(cost for cost in costs if cost.path == request.transport).attention_bytes
    needed = attention + stream + round(request.reserved * GIB)
    return Row(
        cp_size=cp_size,
        shard_len=length,
        padding=(padded - request.seq_len) / padded,
        idle_ranks=cp_size - -(-request.seq_len // length),
        costs=costs,
        stream_bytes=stream,
        imbalance=work(sizes, last) / work(sizes, first),
        needed_bytes=needed,
        fits=needed <= request.gpu_memory * GIB,
    )


def smallest_that_fits(request: Request) -> int | None:
    """Return the smallest power of two that divides the ranks and fits, None if none does."""
    sizes = (size for size in powers_of_two(request.ranks) if request.ranks % size == 0)
    return next((size for size in sizes if row(request, size).fits), None)


def warnings(request: Request, rows: Sequence[Row], *, chosen: int | None) -> list[str]:
    """Say which settings are poor, and what is better.

    Args:
        request: What the plan is made for.
        rows: The sizes that are planned.
        chosen: The user's own choice of cp_size, None for a table of all.

    Returns:
        A line for each kind of trouble, with the sizes that have it.
    """
    sizes, memory = request.sizes, request.gpu_memory
    smallest = smallest_that_fits(request)
    multiple = local_seq_multiple(sizes.compress_ratios)

    def having(troubled: Sequence[Row]) -> str:
        return "cp_size " + ", ".join(str(each.cp_size) for each in troubled)

    lines = []
    if request.seq_len > sizes.max_position_embeddings:
        lines.append(
            f"--seq-len {request.seq_len} is more than max_position_embeddings="
            f"{sizes.max_position_embeddings}, the longest row the model knows positions for"
        )
    if short := [each for each in rows if each.shard_len < sizes.sliding_window]:
        lines.append(
            f"{having(short)}: a shard is shorter than sliding_window={sizes.sliding_window}, so "
            "keys come from several ranks before; use a smaller cp_size or longer rows"
        )
    if wasteful := [each for each in rows if each.padding > 0.05]:
        most = max(each.padding for each in wasteful)
        lines.append(
            f"{having(wasteful)}: up to {most:.0%} of the row is padding (shards hold a multiple "
            f"of {multiple} tokens); use a smaller cp_size, or rows of a multiple of cp_size * "
            f"{multiple} tokens"
        )
    if idle := [each for each in rows if each.idle_ranks > 0]:
        useful = -(-request.seq_len // max(multiple, 2))
        lines.append(
            f"{having(idle)}: some ranks hold padding only; {request.seq_len} tokens fill "
            f"{useful} ranks at most"
        )
    if unequal := [each for each in rows if each.imbalance > 1.5]:
        most = max(each.imbalance for each in unequal)
        lines.append(
            f"{having(unequal)}: the last rank works up to {most:.1f} times as much as the first, "
            "which waits for it; a smaller cp_size wastes less"
        )
    if uneven := [each for each in rows if request.ranks % each.cp_size]:
        lines.append(
            f"{having(uneven)}: --ranks {request.ranks} is not divisible by it, and no whole "
            "number of data-parallel groups is left; use a divisor"
        )
    if chosen is not None and smallest is not None and chosen > smallest:
        lines.append(
            f"--cp-size {chosen} is larger than the memory needs: {smallest} fits, and the other "
            "ranks could work on other rows"
        )
    if masked := [each for each in rows if each.of(HOST).attention_bytes > memory * GIB]:
        most = max(each.of(HOST).attention_bytes for each in masked) / GIB
        lines.append(
            f"{having(masked)}: AutoModel's own path needs up to {most:,.0f} GiB for attention "
            f"(its mask is dense), more than --gpu-memory {memory:g}"
        )
    return lines
