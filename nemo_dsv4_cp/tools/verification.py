"""Whether a recipe's model under CP is the host's model on one rank: shrunk, and run on both."""

# B batch rows   S tokens a row   V vocabulary   E hidden size   M hyper-connection streams

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM
from torch.nn.functional import cross_entropy

from nemo_dsv4_cp.config import DeepseekV4ContextParallelConfig
from nemo_dsv4_cp.exchange.collectives import all_reduce_sum, cp_size
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from nemo_dsv4_cp.sequence.packing import NO_DOCUMENT
from nemo_dsv4_cp.tools import local_ranks

OUTPUT_LIMIT = 1e-5
GRADIENT_LIMIT = 5e-5
# Of the terms of a sum that cancels. Of 1,482 scales (drawn weights, S 33 to 1,031, 2 to 4 ranks)
# none of ours was further than 5.5 eps from the host's, and none of the host's in float32 further
# than 8.1 eps from its own in float64.
CANCELLATION_LIMIT = 16 * torch.finfo(torch.float32).eps

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "o_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "index_head_dim": 16,
    # Index scores are sums of relu: with few heads many tie at exactly 0, and any choice is right.
    "index_n_heads": 16,
    # No fewer than there are entries: rounding before a choice could swap two near ties.
    "index_topk": 4096,
    "num_hash_layers": 1,
    "max_position_embeddings": 1 << 16,
    "torch_dtype": "float32",
}
_SECTIONS = {
    "peft": "LoRA",
    "quantization": "quantisation",
    "qat": "quantisation-aware training",
    "fp8": "FP8",
    "compile": "compilation",
    "teacher_model": "the teacher",
}
_DEGREES = {
    "pp_size": "pipeline stages",
    "ep_size": "expert parallelism",
    "tp_size": "tensor parallelism",
}
_BACKEND = {"attn": ("sdpa", "eager"), "experts": ("torch",), "dispatcher": ("torch",)}
"""What of ``model.backend`` runs as the recipe has it."""
_KEPT = ("sliding_window", "hc_mult", "num_nextn_predict_layers", "routed_scaling_factor")


@dataclass(frozen=True)
class Difference:
    """How far a tensor under CP is from the same on one rank.

    Attributes:
        name: ``"loss"``, ``"logits"`` or a parameter's name.
        value: The largest difference; of gradients relative to the largest entry.
        limit: What rounding may explain.
    """

    name: str
    value: float
    limit: float

    @property
    def passes(self) -> bool:
        """Return whether the difference is within its limit (NaN is not)."""
        return self.value <= self.limit

    @property
    def share(self) -> float:
        """Return the difference over its limit, infinite for NaN."""
        if self.limit == 0 or self.value != self.value:
            return 0.0 if self.value == 0 else math.inf
        return self.value / self.limit


def shrink(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of a few layers that has every kind of layer of the given one.

    Args:
        fields: A model config's fields, ``compress_ratios`` and ``context_parallel`` among them.

    Raises:
        ValueError: If there are no compress ratios to go by.
    """
    ratios = fields.get("compress_ratios")
    if not ratios:
        raise ValueError(
            "the recipe's model.config has no compress_ratios; name them there, or compose the "
            "recipe with nemo-dsv4-cp compose"
        )
    layers = int(fields.get("num_hidden_layers") or len(ratios))
    kinds = list(dict.fromkeys(int(ratio) for ratio in ratios[:layers]))
    predicting = int(fields.get("num_nextn_predict_layers") or 0)
    of_predicting = [int(ratio) for ratio in ratios[layers : layers + predicting]]
    kept = {key: fields[key] for key in _KEPT if fields.get(key) is not None}
    return {
        **_SMALL,
        **kept,
        "num_hidden_layers": len(kinds) + 1,
        # Once more the first kind that compresses: a layer that sees what compression gave.
        "compress_ratios": [*kinds, next((r for r in kinds if r), kinds[0]), *of_predicting],
        "context_parallel": fields.get("context_parallel"),
    }


def left_out(recipe: Mapping[str, Any]) -> list[str]:
    """Name what a recipe trains with and :func:`verify` does not run, in words and by setting."""
    found = []
    for section, words in _SECTIONS.items():
        value = recipe.get(section)
        if value and not (isinstance(value, Mapping) and value.get("enabled") is False):
            found.append(f"{words} ({section})")
    distributed = recipe.get("distributed") or {}
    for name, words in _DEGREES.items():
        if (distributed.get(name) or 1) != 1:
            found.append(f"{words} (distributed.{name}: {distributed[name]})")
    if distributed.get("activation_checkpointing"):
        found.append("recomputation (distributed.activation_checkpointing)")
    backend = (recipe.get("model") or {}).get("backend") or {}
    for name, run in _BACKEND.items():
        if backend.get(name, run[0]) not in run:
            found.append(f"model.backend.{name}: {backend[name]}")
    return found


def documents_for(packed: bool, cp_size: int, multiple: int) -> list[list[int]]:
    """Return lengths of documents, row by row, that put cuts at awkward places.

    Args:
        packed: Several documents a row, or one.
        cp_size: Number of CP ranks.
        multiple: What shards are a multiple of when rows are not packed.
    """
    shard = max(2 * multiple, 64)
    whole = cp_size * shard - shard // 3
    if not packed:
        return [[whole], [whole // 2]]
    return [[1, whole // 2, 3, whole // 3, 7], [whole - 5]]


def verify(fields: Mapping[str, Any], *, cp_size: int, packed: bool) -> list[Difference]:
    """Run the shrunk model on one rank and on ``cp_size`` local ranks, float32, and compare.

    Both start from the same weights and see the same batch. The reference is the host's own model,
    each document of a packed row alone.

    Args:
        fields: A recipe's model config.
        cp_size: Number of local ranks.
        packed: Whether rows hold several documents.

    Returns:
        Loss, logits and the gradient of every parameter that has one.

    Raises:
        RankFailed: If a rank raised.
        ValueError: If the config cannot be made.
    """
    small = shrink(fields)
    config = DeepseekV4ContextParallelConfig(**small)
    multiple = config.context_parallel.resolve_pad_multiple(small["compress_ratios"])
    documents = documents_for(packed, cp_size, multiple)
    differences: list[Difference] = local_ranks.run(_compare, cp_size, small, documents, packed)
    return differences


def gradient_limit(name: str, reference: Mapping[str, torch.nn.Parameter]) -> float:
    """Return how far rounding may take a gradient from the reference's, of its largest entry.

    That is 5e-5, and only for the scales of hyper-connections what their sum makes of rounding, if
    it is more. A scale s is one number for all tokens, ``s * (fn @ x) + base``, so its gradient is
    a sum over tokens, streams and features that can cancel to a thousandth of its terms and less,
    while each term keeps its rounding. It is also ``(fn * fn.grad).sum() / s``, which gives the
    size of the terms, for this model and this batch, from the reference's own gradients.

    Args:
        name: A parameter's name in the model.
        reference: The reference's parameters by name, with their gradients.
    """
    if not name.endswith(("_hc.scale", "hc_head.hc_scale")):
        return GRADIENT_LIMIT
    scale, fn = reference[name], reference[name.removesuffix("scale") + "fn"]
    if scale.grad is None or fn.grad is None:
        return GRADIENT_LIMIT
    # [M, M E] for the head's one scale; else [(2 + M) M, M E] for three: pre, post and combination.
    rows = fn.shape[0]
    streams = math.isqrt(rows + 1) - 1
    parts = [rows] if scale.numel() == 1 else [streams, streams, streams * streams]
    terms = (fn.detach() * fn.grad).abs().sum(dim=1).split(parts)
    sums = torch.stack([part.sum() for part in terms]) / scale.detach().abs()
    cancellation = sums.max() / scale.grad.abs().max().clamp(min=1e-30)
    return max(GRADIENT_LIMIT, CANCELLATION_LIMIT * float(cancellation))


def draw_weights(module: torch.nn.Module, seed: int) -> None:
    """Draw every parameter, those included that the host starts as constants.

    Hyper-connections are drawn apart: at the host's start all streams are alike, and the gradients
    of their parameters are rounding already in the reference.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or name.endswith("scale"):
                drawn = 1 + 0.1 * noise
            elif name.endswith(("base", "sinks_param.weight", "ape_param.weight")):
                drawn = 0.5 * noise
            elif "embed" in name:
                drawn = noise
            else:
                drawn = noise * parameter.shape[-1] ** -0.5
            parameter.copy_(drawn)


def packed_batch(documents: list[list[int]], seq_len: int, seed: int, vocab: int) -> dict[str, Any]:
    """Draw a batch as the host's packed collater makes it."""
    generator = torch.Generator().manual_seed(seed)
    rows, most = len(documents), max(map(len, documents))
    lengths = torch.full((rows, most), NO_DOCUMENT)
    position_ids = torch.zeros(rows, seq_len, dtype=torch.long)
    labels = torch.full((rows, seq_len), -100)
    for row, of_row in enumerate(documents):
        lengths[row, : len(of_row)] = torch.tensor(of_row)
        counting = torch.cat([torch.arange(length) for length in of_row])
        position_ids[row, : len(counting)] = counting
        labels[row, : len(counting)] = torch.randint(
            0, vocab, (len(counting),), generator=generator
        )
    return {
        "input_ids": torch.randint(0, vocab, (rows, seq_len), generator=generator),
        "labels": labels,
        "position_ids": position_ids,
        "seq_lens": lengths,
        "seq_lens_padded": lengths.clone(),
        "qkv_format": "thd",
    }


class _Mesh:
    """The little of a one-dimensional device mesh that batch functions use."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def size(self) -> int:
        return cp_size(self._group)

    def get_group(self) -> Any:
        return self._group


def _loss(model: Any, out: Any, targets: list[torch.Tensor], count: int) -> torch.Tensor:
    """Return the summed loss of the logits and of each MTP depth over the number of labels."""
    logits = [out.logits, *(model.lm_head(hidden) for hidden in out.mtp_per_depth_h or [])]
    losses = [
        cross_entropy(each.flatten(0, 1).float(), target.flatten(), reduction="sum") / count
        for each, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(losses).sum()


def _compare(
    group: Any, rank: int, small: dict[str, Any], documents: list[list[int]], packed: bool
) -> list[Difference]:
    torch.compiler.set_stance("force_eager")  # shapes change with each document
    device = local_ranks.device_of(rank, cp_size(group))
    config = DeepseekV4ContextParallelConfig(**small)
    backend = BackendConfig(
        attn="sdpa",
        linear="torch",
        rms_norm="torch_fp32",
        experts="torch",
        dispatcher="torch",
        rope_fusion=False,
        enable_hf_state_dict_adapter=False,
    )
    reference = DeepseekV4ForCausalLM(config, backend=backend)
    reference.initialize_weights(torch.device("cpu"), torch.float32)  # the hash gate's table
    draw_weights(reference, seed=0)
    mine = DeepseekV4ContextParallelForCausalLM(config, backend=backend)
    mine.load_state_dict(reference.state_dict())
    for model in (reference, mine):
        model.to(device).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".indexer." not in name)  # it chooses, and is not trained

    seq_len = max(map(sum, documents))
    batch = packed_batch(documents, seq_len, seed=1, vocab=config.vocab_size)
    if not packed:
        real = batch["labels"] != -100
        batch = {"input_ids": batch["input_ids"], "labels": batch["labels"], "attention_mask": real}
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    ids, labels = batch["input_ids"], batch["labels"]
    count = int((labels != -100).sum())
    depths = range(1, mine.mtp_config.num_layers + 1)

    expected = torch.zeros(*ids.shape, config.vocab_size, device=device)
    expected_loss = torch.zeros((), device=device)
    for row, lengths in enumerate(documents):
        begin = 0
        for length in lengths:
            own = (slice(row, row + 1), slice(begin, begin + length))
            targets = [labels[own]]
            for depth in depths:
                ahead = torch.full_like(labels[own], -100)
                ahead[:, :-depth] = labels[own][:, depth:]
                targets.append(ahead)
            out = reference(ids[own])
            loss = _loss(reference, out, targets, count)
            loss.backward()
            expected[own], expected_loss = out.logits.detach(), expected_loss + loss.detach()
            begin += length

    shifted = mine.prepare_mtp_inputs_for_cp(dict(batch)) if depths else None
    sharder = mine.prepare_model_inputs_for_cp(batch)["cp_sharder"]
    sharder._cp_mesh = _Mesh(group)
    _, batch = sharder.shard(batch)
    targets = [batch.pop("labels")]
    if shifted is not None:
        batch["mtp_per_depth_input_ids"] = [
            sharder.shard_token_tensor(tensor, fill=0) for tensor in shifted.input_ids
        ]
        targets += [sharder.shard_token_tensor(tensor, fill=-100) for tensor in shifted.targets]
    out = mine(**batch)
    loss = _loss(mine, out, targets, count)
    loss.backward()

    total = all_reduce_sum(loss.detach(), [group])
    logits = sharder.gather_token_tensor(out.logits.detach(), trim=True, fill=0.0)
    gap = (logits - expected)[labels != -100].abs().max()
    differences = [
        Difference("loss", float((total - expected_loss).abs()), OUTPUT_LIMIT),
        Difference("logits", float(gap), OUTPUT_LIMIT),
    ]
    theirs = dict(reference.named_parameters())
    for name, parameter in mine.named_parameters():
        mine_grad, their_grad = parameter.grad, theirs[name].grad
        if mine_grad is None and their_grad is None:
            continue
        zero = torch.zeros_like(parameter)
        mine_grad = all_reduce_sum(zero if mine_grad is None else mine_grad, [group])
        their_grad = zero if their_grad is None else their_grad
        largest = their_grad.abs().max().clamp(min=1e-30)
        value = float((mine_grad - their_grad).abs().max() / largest)
        differences.append(Difference(f"gradient of {name}", value, gradient_limit(name, theirs)))
    return differences
