# SPDX-License-Identifier: Apache-2.0
"""Jobs that compare packed rows under CP with each document run alone on AutoModel's model."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from nemo_automodel.components.models.deepseek_v4.layers import (
    DeepseekV4Attention,
    DeepseekV4RotaryEmbedding,
    build_causal_padding_mask,
)
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from nemo_dsv4_cp.attention.layer import ContextParallelAttention
from nemo_dsv4_cp.attention.step import STEP_KEY, StepContext
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.tools.verification import (
    GRADIENT_LIMIT,
    OUTPUT_LIMIT,
    Difference,
    packed_batch,
)
from tests.parity import (
    GroupMesh,
    compare_gradients,
    cpu_backend,
    randomise,
    tiny_config,
)

Rows = list[list[int]]
"""Lengths of the documents of each row."""


def starts_of(documents: Rows, seq_len: int) -> torch.Tensor:
    """Return [B, D + 1] document starts, ``seq_len`` in unused slots."""
    most = max(map(len, documents))
    starts = torch.full((len(documents), most + 1), seq_len)
    for row, lengths in enumerate(documents):
        starts[row, : len(lengths) + 1] = torch.tensor([0, *lengths]).cumsum(0)
    return starts


def packed_attention_job(
    group: dist.ProcessGroup,
    rank: int,
    ratio: int,
    documents: Rows,
    options: dict[str, Any],
    recompute: bool = False,
    seed: int = 0,
    spare: int = 0,
    **changes: Any,
) -> list[Difference]:
    """One attention layer over rows cut into shards that heed no document and no window."""
    config = tiny_config([ratio], context_parallel=options, **changes)
    reference = DeepseekV4Attention(config, 0, cpu_backend())
    randomise(reference, seed)
    mine = ContextParallelAttention(config, 0, cpu_backend())
    mine.load_state_dict(reference.state_dict())
    for module in (mine, reference):
        if module.compressor is not None and module.compressor.indexer is not None:
            module.compressor.indexer.requires_grad_(False)
    mine._cp_group = group

    size = dist.get_world_size(group)
    longest = max(map(sum, documents))
    local_len = -(-longest // size) + spare
    seq_len = local_len * size
    rope = DeepseekV4RotaryEmbedding(10000.0, config.head_dim, 0.5)
    rope_compress = DeepseekV4RotaryEmbedding(160000.0, config.head_dim, 0.5)
    generator = torch.Generator().manual_seed(seed + 1)
    hidden = torch.randn(len(documents), seq_len, config.hidden_size, generator=generator)
    weight = torch.randn(len(documents), seq_len, config.hidden_size, generator=generator)

    def call(attention: Any, x: torch.Tensor, mask: Any, positions: Any, **kwargs: Any) -> Any:
        return attention(
            x,
            rope(x, positions),
            attention_mask=mask,
            position_embeddings_compress=rope_compress(x, positions),
            rotary_compress=rope_compress,
            position_ids=positions,
            **kwargs,
        )[0]

    whole = hidden.clone().requires_grad_()
    expected = torch.zeros_like(hidden)
    positions = torch.zeros(len(documents), seq_len, dtype=torch.long)
    real = torch.zeros(len(documents), seq_len, dtype=torch.bool)
    for row, lengths in enumerate(documents):
        begin = 0
        for length in lengths:
            own = slice(begin, begin + length)
            alone = whole[row : row + 1, own]
            mask = build_causal_padding_mask(
                None, length, torch.float32, alone.device, 1, config.sliding_window
            )
            positions[row, own], real[row, own] = torch.arange(length), True
            out = call(reference, alone, mask, positions[row : row + 1, own])
            expected[row, own] = out[0].detach()
            (out[0] * weight[row, own]).sum().backward()
            begin += length

    layout = SequenceLayout.of_documents(
        starts_of(documents, seq_len), local_len, cp_rank=rank, cp_size=size
    )
    own = slice(layout.start, layout.end)
    shard = hidden[:, own].clone().requires_grad_()

    step = StepContext(layout, group, config.context_parallel)

    def forward(x: torch.Tensor) -> Any:
        return call(mine, x, None, positions[:, own], **{STEP_KEY: step})

    out = checkpoint(forward, shard, use_reentrant=False) if recompute else forward(shard)
    here = real[:, own]
    (out * weight[:, own] * here[..., None]).sum().backward()
    gaps = ((out.detach() - expected[:, own]), (shard.grad - whole.grad[:, own]))
    outputs, gradient = (float((gap * here[..., None]).abs().max()) for gap in gaps)
    gradient /= max(float(whole.grad.abs().max()), 1e-30)
    return [
        Difference("outputs", outputs, OUTPUT_LIMIT),
        Difference("input gradient", gradient, GRADIENT_LIMIT),
        *compare_gradients(group, mine, reference),
    ]


def packed_model_job(
    group: dist.ProcessGroup,
    rank: int,
    ratios: list[int],
    documents: Rows,
    options: dict[str, Any],
    seed: int = 0,
    mtp_layers: int = 0,
) -> list[Difference]:
    """A whole MoE model on packed rows, against each document alone on AutoModel's at CP size 1."""
    config = tiny_config(
        ratios, context_parallel=options, index_topk=512, num_nextn_predict_layers=mtp_layers
    )
    reference = DeepseekV4ForCausalLM(config, backend=cpu_backend())
    mine = DeepseekV4ContextParallelForCausalLM(config, backend=cpu_backend())
    reference.initialize_weights(torch.device("cpu"), torch.float32)
    randomise(reference, seed)
    mine.load_state_dict(reference.state_dict())
    for model in (reference, mine):
        model.train()
        for name, parameter in model.named_parameters():
            if ".indexer." in name:
                parameter.requires_grad_(False)

    seq_len = max(map(sum, documents)) + 5
    batch = packed_batch(documents, seq_len, seed + 1, config.vocab_size)
    ids, labels = batch["input_ids"], batch["labels"]
    count = int((labels != -100).sum())

    def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        flat = logits.flatten(0, 1).float()
        return cross_entropy(flat, targets.flatten(), reduction="sum") / count

    def mtp_loss(model: Any, out: Any, targets: list[torch.Tensor]) -> torch.Tensor:
        predicted = out.mtp_per_depth_h or []
        return sum(
            (
                loss_of(model.lm_head(h), target)
                for h, target in zip(predicted, targets, strict=True)
            ),
            torch.zeros(()),
        )

    expected = torch.zeros(*ids.shape, config.vocab_size)
    expected_loss = torch.zeros(())
    for row, lengths in enumerate(documents):
        begin = 0
        for length in lengths:
            own = slice(begin, begin + length)
            out = reference(ids[row : row + 1, own])
            targets = labels[row : row + 1, own]
            shifted = []
            for depth in range(1, mtp_layers + 1):
                ahead = torch.full_like(targets, -100)
                ahead[:, :-depth] = targets[:, depth:]
                shifted.append(ahead)
            loss = loss_of(out.logits, targets) + mtp_loss(reference, out, shifted)
            loss.backward()
            expected[row, own] = out.logits[0].detach()
            expected_loss += loss.detach()
            begin += length

    shifted = mine.prepare_mtp_inputs_for_cp(dict(batch)) if mtp_layers else None
    sharder = mine.prepare_model_inputs_for_cp(batch)["cp_sharder"]
    sharder._cp_mesh = GroupMesh(group)
    _, batch = sharder.shard(batch)
    targets = []
    if shifted is not None and dist.get_world_size(group) > 1:
        batch["mtp_per_depth_input_ids"] = [
            sharder.shard_token_tensor(t, fill=0) for t in shifted.input_ids
        ]
    if shifted is not None:
        targets = [sharder.shard_token_tensor(t, fill=-100) for t in shifted.targets]
    local_labels = batch.pop("labels")
    out = mine(**batch)
    loss = loss_of(out.logits, local_labels) + mtp_loss(mine, out, targets)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)

    logits = sharder.gather_token_tensor(out.logits.detach(), trim=True, fill=0.0)
    gap = float((logits - expected)[labels != -100].abs().max())
    return [
        Difference("outputs", gap, OUTPUT_LIMIT),
        Difference("loss", float((total - expected_loss).abs()), OUTPUT_LIMIT),
        *compare_gradients(group, mine, reference),
    ]
