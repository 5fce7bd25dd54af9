# SPDX-License-Identifier: Apache-2.0
"""Jobs that compare a V4.1 run under CP with AutoModel's own model at CP size 1, float32 on CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from nemo_automodel.components.distributed.activation_checkpointing import (
    make_selective_checkpoint_context_fn,
)
from nemo_automodel.components.models.deepseek_v41 import attention as automodels
from nemo_automodel.components.models.deepseek_v41.cp import shard_cp_batch
from nemo_automodel.components.models.deepseek_v41.engram import _compressed_token_map
from nemo_automodel.components.models.deepseek_v41.model import DeepseekV41ForCausalLM
from tokenizers import Tokenizer, decoders, models
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerFast

from nemo_dsv4_cp import DeepseekV41ContextParallelConfig
from nemo_dsv4_cp.attention.layer_v41 import ContextParallelAttentionV41
from nemo_dsv4_cp.model_v41 import DeepseekV41ContextParallelForCausalLM
from nemo_dsv4_cp.tools.verification import OUTPUT_LIMIT, Difference, rounding_of_gradients
from nemo_dsv4_cp.tools.verified_models import unquantized
from tests.parity import GroupMesh, compare_gradients, cpu_backend, randomise

Rows = list[list[int]]
"""Lengths of the documents of each row."""

VOCABULARY = 97


@dataclass(frozen=True, eq=False)
class Trained:
    """One rank's part of a step.

    Attributes:
        logits: Of its tokens.
        gradients: Its part of them, by parameter.
        chosen: Top-k indices and candidates of its tokens, layer by layer as they were selected.
        scored: By compress ratio, how many entries it scored where all visible ones are.
    """

    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]
    chosen: list[torch.Tensor]
    scored: dict[int, int]


SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=8,
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=8,
    q_lora_rank=24,
    o_lora_rank=8,
    o_groups=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    sliding_window=7,
    # Window, source, reuse, source without reuse, source with candidates, two that select again.
    compress_ratios=[0, 2, 2, 2, 1, 1, 1, 1],
    kv_source_layer_ids=[1, 3, 4],
    index_source_layer_ids=[1, 3, 4, 5, 7],
    candidate_source_layer_id=4,
    candidate_topk_blocks=6,
    candidate_block_size=4,
    index_head_dim=32,
    # Scores are sums of relu: with few heads many tie at exactly 0, and any choice is right.
    index_n_heads=16,
    index_topk=9,
    hc_mult=2,
    hc_sinkhorn_iters=4,
    engram_layer_ids=[1, 4],
    engram_num_embeddings=[700, 700],
    engram_vocab_size=64,
    engram_n_heads=2,
    engram_head_dim=8,
    engram_max_ngram_size=4,
    engram_pad_token_id=2,
    num_nextn_predict_layers=0,
    max_position_embeddings=8192,
    dtype="float32",
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a fast tokenizer of one character per token, as Engram's hash needs one."""
    vocabulary = {chr(33 + token): token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_config(options: dict[str, Any], **changes: Any) -> DeepseekV41ContextParallelConfig:
    _, compressed = _compressed_token_map(tiny_tokenizer())
    text = SIZES | {"engram_compressed_vocab_size": compressed} | changes
    return DeepseekV41ContextParallelConfig(
        text_config=text,
        vision_config={"num_hidden_layers": 0},
        dtype="float32",
        context_parallel=options,
    )


def packed_rows(documents: Rows, seed: int) -> dict[str, torch.Tensor]:
    """Return rows of documents end to end, padded at their end, and targets within each."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = len(documents), max(map(sum, documents)) + 1
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = torch.full_like(ids, -100)
    lengths = torch.full((rows, max(map(len, documents))), -1000)
    for row, of_row in enumerate(documents):
        begin = 0
        for document, tokens in enumerate(of_row):
            end = begin + tokens
            labels[row, begin : end - 1] = ids[row, begin + 1 : end]
            lengths[row, document], begin = tokens, end
        ids[row, begin:] = 2
    return {"input_ids": ids, "labels": labels, "seq_lens": lengths, "qkv_format": "thd"}


def unpacked_rows(lengths: list[int], seed: int) -> dict[str, torch.Tensor]:
    """Return rows of one document each, padded to the longest."""
    batch = packed_rows([[length] for length in lengths], seed)
    ids, labels = batch["input_ids"][:, :-1], batch["labels"][:, :-1]
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def model_job(
    group: dist.ProcessGroup,
    rank: int,
    documents: Rows | list[int],
    options: dict[str, Any],
    seed: int = 0,
    recompute: bool | str = False,
    quantised: bool = False,
    **changes: Any,
) -> list[Difference]:
    """A whole model, CP size = the group's, against AutoModel's own at CP size 1.

    Rows are packed if ``documents`` are lists, and hold one document each if they are lengths.
    Blocks are checkpointed with ``recompute``, by AutoModel's policy if it is "selective".
    """
    if not quantised:
        with unquantized():
            return model_job(
                group, rank, documents, options, seed, recompute, quantised=True, **changes
            )
    config, size = tiny_config(options, **changes), dist.get_world_size(group)
    with patch.object(dist, "is_initialized", lambda: False):
        # Each rank has whole Engram tables: their gradients are compared like all others.
        reference, mine = (
            cls(config, backend=cpu_backend(), tokenizer=tiny_tokenizer())
            for cls in (DeepseekV41ForCausalLM, DeepseekV41ContextParallelForCausalLM)
        )
    randomise(reference, seed)
    mine.load_state_dict(reference.state_dict())
    for model in (reference, mine):
        model.train()
    packed = isinstance(documents[0], list)
    batch = (packed_rows if packed else unpacked_rows)(documents, seed + 1)
    labels = batch["labels"]
    count = int((labels != -100).sum())

    def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        flat = logits.flatten(0, 1).float()
        return cross_entropy(flat, targets.flatten(), reduction="sum") / count

    whole = {name: tensor for name, tensor in batch.items() if name != "labels"}
    expected = reference(**whole).logits
    expected_loss = loss_of(expected, labels)
    expected_loss.backward()
    spread = {}
    if config.text_config.engram_layer_ids:
        spread = rounding_of_gradients(
            reference, lambda: loss_of(reference(**whole).logits, labels).backward()
        )

    _checkpoint(mine, recompute)
    local, places = dict(batch), None
    if size > 1 or packed:
        sharder = mine.prepare_model_inputs_for_cp(batch)["cp_sharder"]
        mesh = GroupMesh(group) if size > 1 else None
        _, local, layout = sharder.shard_batch(mesh, None, local)
        places = layout.input_token_stream_positions
    targets = local.pop("labels")
    logits = mine(**local).logits
    loss = loss_of(logits, targets)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)

    every = [torch.empty_like(logits) for _ in range(size)]
    dist.all_gather(every, logits.detach().contiguous(), group=group)
    of_row = torch.cat(every, dim=1)
    if places is None:
        places = torch.arange(labels.shape[1]).expand_as(labels)
    places = places.clamp(min=0)[..., None].expand(-1, -1, of_row.shape[-1])
    gap = (of_row.gather(1, places) - expected.detach())[labels != -100].abs().max()
    return [
        Difference("outputs", float(gap), OUTPUT_LIMIT),
        Difference("loss", float((total - expected_loss.detach()).abs()), OUTPUT_LIMIT),
        *(
            replace(found, limit=max(found.limit, 3 * spread.get(found.name, 0.0)))
            for found in compare_gradients(group, mine, reference)
        ),
    ]


def balance_job(
    group: dist.ProcessGroup,
    rank: int,
    documents: Rows | list[int],
    options: dict[str, Any],
    recompute: bool | str = False,
) -> list[Trained]:
    """Train a quantised model for a step, with ``balance: off`` and then with ``on``."""
    return [
        _trained(group, documents, options | {"balance": balance}, recompute)
        for balance in ("off", "on")
    ]


def _trained(
    group: dist.ProcessGroup,
    documents: Rows | list[int],
    options: dict[str, Any],
    recompute: bool | str,
) -> Trained:
    config = tiny_config(options, engram_layer_ids=[], engram_num_embeddings=[])
    model = DeepseekV41ContextParallelForCausalLM(config, backend=cpu_backend())
    randomise(model, 0)
    _checkpoint(model.train(), recompute)
    batch = (packed_rows if isinstance(documents[0], list) else unpacked_rows)(documents, 1)
    sharder = model.prepare_model_inputs_for_cp(batch)["cp_sharder"]
    _, local, _ = sharder.shard_batch(GroupMesh(group), None, batch)
    targets = local.pop("labels")
    chosen: list[torch.Tensor] = []
    scored: dict[int, int] = {}
    layer = ContextParallelAttentionV41
    select, select_for = layer._select, layer._select_for

    def noting(attention: Any, *args: Any) -> list[torch.Tensor]:
        made = select(attention, *args)
        chosen.extend(made)
        return made

    def counting(attention: Any, queries: Any, state: Any) -> list[torch.Tensor]:
        plan, (rows, count) = queries.plan, queries.q_BLIF.shape[:2]
        seen = plan.entries_seen(slice(0, count), batch=rows)
        if not attention.indexer.uses_candidates:
            scored[plan.ratio] = scored.get(plan.ratio, 0) + seen
        return select_for(attention, queries, state)

    with patch.object(layer, "_select", noting), patch.object(layer, "_select_for", counting):
        logits = model(**local).logits
        cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Trained(logits.detach(), gradients, chosen, scored)


def attention_chain_job(
    group: dist.ProcessGroup,
    rank: int,
    documents: Rows,
    options: dict[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Every attention layer on hidden states of its own, keys quantised, against AutoModel's.

    Returns:
        The largest difference of outputs, and the share that differs of entries and index keys
        (bit by bit) and of the entries that queries select.
    """
    whole_config, size = tiny_config(options or {}), dist.get_world_size(group)
    config = whole_config.text_config
    torch.manual_seed(seed)
    batch = packed_rows(documents, seed)
    sharder = partial(shard_cp_batch, pad_multiple=2, packed_alignment=2)
    _, whole, _ = sharder(None, None, dict(batch))
    _, local, _ = sharder(GroupMesh(group) if size > 1 else None, None, dict(batch))
    length = local["input_ids"].shape[1]
    own = slice(rank * length, (rank + 1) * length)
    padding = length * size - whole["input_ids"].shape[1]
    theirs: Any = automodels.DeepseekV41AttentionState()
    mine: Any = theirs
    found = {"outputs": 0.0, "entries": 0.0, "index keys": 0.0, "selected": 0.0}

    def keep_worst(name: str, value: torch.Tensor) -> None:
        found[name] = max(found[name], float(value))

    for layer in range(config.num_hidden_layers):
        reference = automodels.DeepseekV41Attention(config, layer, cpu_backend())
        ours = automodels.DeepseekV41Attention(config, layer, cpu_backend())
        randomise(reference, seed + layer)
        ours.load_state_dict(reference.state_dict())
        ContextParallelAttentionV41.adopt(ours, config, whole_config.context_parallel)
        hidden = pad(torch.randn(*whole["input_ids"].shape, config.hidden_size), (0, 0, 0, padding))
        expected = reference(
            hidden[:, : hidden.shape[1] - padding],
            position_ids=whole["position_ids"],
            state=theirs,
            attention_mask=whole["attention_mask"],
            packed_seq_ids=whole["packed_seq_ids"],
        )
        out = ours(
            hidden[:, own],
            position_ids=local["position_ids"],
            state=mine,
            attention_mask=local["attention_mask"],
            cp_group=group,
            packed_seq_ids=local["packed_seq_ids"],
        )
        theirs, mine = expected.state, out.state
        wide = pad(expected.hidden_states, (0, 0, 0, padding))[:, own]
        keep_worst("outputs", (out.hidden_states - wide).abs().max())
        if layer in config.kv_source_layer_ids:
            count = theirs.compressed_kv.shape[1]
            entries, keys = mine.entries_BPD[:, :count], mine.index_keys_BPF[:, :count]
            keep_worst("entries", (entries != theirs.compressed_kv).float().mean())
            keep_worst("index keys", (keys != theirs.index_keys).float().mean())
        if layer in config.index_source_layer_ids:
            chosen = _as_sets(pad(theirs.topk_indices, (0, 0, 0, padding), value=-1)[:, own])
            real = local["attention_mask"][..., None]
            selected = _as_sets(mine.selected_BLK.masked_fill(~real, -1))
            keep_worst("selected", (chosen ^ selected).sum() / chosen.sum().clamp(min=1))
    return found


def _as_sets(selected: torch.Tensor) -> torch.Tensor:
    """Return which of the entries 0..255 are among [B, L, K], bool [B, L, 257]."""
    marks = torch.zeros(*selected.shape[:2], 257, dtype=torch.bool)
    marks.scatter_(-1, selected.long().masked_fill(selected < 0, 256), True)
    marks[..., 256] = False
    return marks


def _checkpoint(model: Any, recompute: bool | str) -> None:
    """Checkpoint a model's blocks, by AutoModel's policy if ``recompute`` is "selective"."""
    if not recompute:
        return
    selective = recompute == "selective"
    saving = {"context_fn": make_selective_checkpoint_context_fn()} if selective else {}
    for name, block in model.model.layers.items():
        model.model.layers[name].forward = _recomputing(block.forward, saving)


def _recomputing(forward: Any, saving: dict[str, Any]) -> Any:
    """Wrap a block's forward in activation checkpointing."""

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **saving, **kwargs)

    return recomputed
