# SPDX-License-Identifier: Apache-2.0
"""Jobs that compare a CP run with AutoModel's own model at CP size 1, float32 on CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.deepseek_v4.layers import (
    DeepseekV4Attention,
    DeepseekV4RotaryEmbedding,
    build_causal_padding_mask,
)
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from nemo_dsv4_cp import DeepseekV4ContextParallelConfig
from nemo_dsv4_cp.attention import ContextParallelAttention
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from nemo_dsv4_cp.sequence.layout import SequenceLayout, local_seq_multiple, padded_seq_len
from nemo_dsv4_cp.tools.verification import (
    GRADIENT_LIMIT,
    OUTPUT_LIMIT,
    Difference,
    gradient_limit,
)
from nemo_dsv4_cp.tools.verification import draw_weights as randomise

SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    moe_intermediate_size=32,
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=16,
    q_lora_rank=32,
    o_lora_rank=16,
    o_groups=2,
    n_routed_experts=8,
    num_experts_per_tok=2,
    index_head_dim=16,
    # Scores are sums of relu: with few heads many tie at exactly 0, and any choice is right.
    index_n_heads=16,
    index_topk=24,
    sliding_window=128,
    num_hash_layers=1,
    hc_mult=2,
    num_nextn_predict_layers=0,
    max_position_embeddings=8192,
    torch_dtype="float32",
)


def tiny_config(ratios: list[int], **changes: Any) -> DeepseekV4ContextParallelConfig:
    layers = {"num_hidden_layers": len(ratios), "compress_ratios": ratios}
    return DeepseekV4ContextParallelConfig(**(SIZES | layers | changes))


def cpu_backend() -> BackendConfig:
    return BackendConfig(
        attn="sdpa",
        linear="torch",
        rms_norm="torch_fp32",
        experts="torch",
        dispatcher="torch",
        rope_fusion=False,
        enable_hf_state_dict_adapter=False,
    )


def rope_of(config: Any, start: int, length: int) -> tuple[Any, DeepseekV4RotaryEmbedding]:
    """Return a fresh rotary embedding of some positions, and its module."""
    rotary = DeepseekV4RotaryEmbedding(160000.0, config.head_dim, 0.5)
    return rotary(torch.zeros(1), torch.arange(start, start + length)[None]), rotary


def worst(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference, relative to the reference's largest entry."""
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def compare_gradients(
    group: dist.ProcessGroup,
    mine: torch.nn.Module,
    reference: torch.nn.Module,
) -> list[Difference]:
    """Sum my gradients over the ranks and compare each with the reference's."""
    differences = []
    theirs = dict(reference.named_parameters())
    for name, parameter in mine.named_parameters():
        if ".indexer." in name or name.startswith("indexer."):
            assert parameter.grad is None, f"{name} feeds integers only, yet has a gradient"
            continue
        expected = theirs[name].grad
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=group)
        if expected is None or not expected.any():  # a row too short for a window
            assert not parameter.grad.any(), f"{name}: the reference has no gradient"
            continue
        value = worst(parameter.grad, expected)
        differences.append(Difference(name, value, gradient_limit(name, theirs)))
    assert differences
    return differences


def attend(
    attention: torch.nn.Module, config: Any, x: torch.Tensor, mask: Any, start: int
) -> torch.Tensor:
    """Return a layer's output for the positions from ``start`` on, AutoModel's or ours."""
    positions = torch.arange(start, start + x.shape[1]).expand(len(x), -1)
    rope = DeepseekV4RotaryEmbedding(10000.0, config.head_dim, 0.5)
    rope_compress = DeepseekV4RotaryEmbedding(160000.0, config.head_dim, 0.5)
    out: torch.Tensor = attention(
        x,
        rope(x, positions),
        attention_mask=mask,
        position_embeddings_compress=rope_compress(x, positions),
        rotary_compress=rope_compress,
        position_ids=positions,
    )[0]
    return out


def attention_job(
    group: dist.ProcessGroup,
    rank: int,
    ratio: int,
    rows: int,
    seq_len: int,
    options: dict[str, Any],
    recompute: bool = False,
    seed: int = 0,
    **changes: Any,
) -> list[Difference]:
    """One attention layer, CP size = the group's, against AutoModel's at CP size 1."""
    config = tiny_config([ratio], context_parallel=options, **changes)
    reference = DeepseekV4Attention(config, 0, cpu_backend()).float()  # 0.5: norms in bfloat16
    randomise(reference, seed)
    mine = ContextParallelAttention(config, 0, cpu_backend())
    mine.load_state_dict(reference.state_dict())
    for module in (mine, reference):
        if module.compressor is not None and module.compressor.indexer is not None:
            module.compressor.indexer.requires_grad_(False)  # as AutoModel does before training
    mine._cp_group = group

    generator = torch.Generator().manual_seed(seed + 1)
    hidden = torch.randn(rows, seq_len, config.hidden_size, generator=generator)
    weight = torch.randn(rows, seq_len, config.hidden_size, generator=generator)

    whole = hidden.clone().requires_grad_()
    mask = build_causal_padding_mask(
        None, seq_len, torch.float32, whole.device, rows, config.sliding_window
    )
    expected = attend(reference, config, whole, mask, 0)
    (expected * weight).sum().backward()

    size = dist.get_world_size(group)
    padded = (
        padded_seq_len(seq_len, cp_size=size, pad_multiple=local_seq_multiple([ratio]))
        if size > 1
        else seq_len
    )
    layout = SequenceLayout.of_padded(padded, cp_rank=rank, cp_size=size)
    own = slice(layout.start, layout.end)
    shard = pad(hidden, (0, 0, 0, padded - seq_len))[:, own].clone().requires_grad_()
    if recompute:
        out = checkpoint(attend, mine, config, shard, None, layout.start, use_reentrant=False)
    else:
        out = attend(mine, config, shard, None, layout.start)
    (out * pad(weight, (0, 0, 0, padded - seq_len))[:, own]).sum().backward()

    real = max(0, min(seq_len, layout.end) - layout.start)
    outputs = gradient = 0.0
    if real:
        here = slice(layout.start, layout.start + real)
        outputs = float((out[:, :real] - expected[:, here]).detach().abs().max())
        # relative to the largest entry of the whole gradient, not of this shard's
        gap = (shard.grad[:, :real] - whole.grad[:, here]).abs().max()
        gradient = float(gap / whole.grad.abs().max())
    return [
        Difference("outputs", outputs, OUTPUT_LIMIT),
        Difference("input gradient", gradient, GRADIENT_LIMIT),
        *compare_gradients(group, mine, reference),
    ]


class GroupMesh:
    """The little of a one-dimensional device mesh that batch functions use."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def size(self) -> int:
        return dist.get_world_size(self.group)

    def get_group(self) -> dist.ProcessGroup:
        return self.group


def model_job(
    group: dist.ProcessGroup,
    rank: int,
    ratios: list[int],
    rows: int,
    seq_len: int,
    options: dict[str, Any],
    padded_row: bool = False,
    seed: int = 0,
    index_topk: int = 512,
    lost: str | None = None,
    moe_overrides: dict[str, Any] | None = None,
    **changes: Any,
) -> list[Difference]:
    """A whole MoE model, CP size = the group's, against AutoModel's own at CP size 1.

    The first rank forgets its part of the gradient of every parameter whose name ends with
    ``lost``.
    """
    config = tiny_config(ratios, context_parallel=options, index_topk=index_topk, **changes)
    reference, mine = (
        cls(config, backend=cpu_backend(), moe_overrides=moe_overrides)
        for cls in (DeepseekV4ForCausalLM, DeepseekV4ContextParallelForCausalLM)
    )
    reference.initialize_weights(torch.device("cpu"), torch.float32)  # the hash gate's table
    randomise(reference, seed)
    mine.load_state_dict(reference.state_dict())
    for model in (reference, mine):
        model.train()
        for name, parameter in model.named_parameters():
            if ".indexer." in name:
                parameter.requires_grad_(False)

    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, config.vocab_size, (rows, seq_len), generator=generator)
    labels = torch.randint(0, config.vocab_size, (rows, seq_len), generator=generator)
    attention_mask = None
    if padded_row:
        attention_mask = torch.ones_like(ids)
        attention_mask[-1, seq_len // 3 :] = 0
        labels[-1, seq_len // 3 :] = -100
    count = int((labels != -100).sum())

    def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        flat = logits.flatten(0, 1).float()
        return cross_entropy(flat, targets.flatten(), reduction="sum") / count

    expected = reference(ids, attention_mask=attention_mask).logits
    expected_loss = loss_of(expected, labels)
    expected_loss.backward()

    batch = {"input_ids": ids.clone(), "labels": labels.clone()}
    if attention_mask is not None:
        batch["attention_mask"] = attention_mask.clone()
    sharder = mine.prepare_model_inputs_for_cp(batch)["cp_sharder"]
    _, batch, facts = sharder.shard_batch(GroupMesh(group), None, batch)
    local_labels = batch.pop("labels")
    logits = mine(**batch).logits
    loss = loss_of(logits, local_labels)
    loss.backward()
    for name, parameter in mine.named_parameters():
        if lost is not None and rank == 0 and name.endswith(lost):
            parameter.grad = None
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)

    length = local_labels.shape[1]
    own = slice(rank * length, (rank + 1) * length)
    padded_labels = pad(labels, (0, facts.padded_seq_len - seq_len), value=-100)
    real = padded_labels[:, own] != -100
    gap = 0.0
    if real.any():
        wide = pad(expected.detach(), (0, 0, 0, facts.padded_seq_len - seq_len))[:, own]
        gap = float((logits.detach() - wide)[real].abs().max())
    return [
        Difference("outputs", gap, OUTPUT_LIMIT),
        Difference("loss", float((total - expected_loss.detach()).abs()), OUTPUT_LIMIT),
        *compare_gradients(group, mine, reference),
    ]


def assert_parity(results: list[list[Difference]]) -> None:
    """Hold every rank to the project's float32 tolerances."""
    for rank, differences in enumerate(results):
        for found in differences:
            assert found.passes, (
                f"rank {rank}: {found.name} differs by {found.value:.2e}, allowed {found.limit:.2e}"
            )
