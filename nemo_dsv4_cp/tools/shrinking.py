# SPDX-License-Identifier: Apache-2.0
"""A recipe's model in a size that any machine runs, and what of the recipe does not run with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    # Index scores are sums of relu: with few heads many tie at exactly 0, and any top-k is right.
    "index_n_heads": 16,
    # As many as there are entries: rounding before the selection could swap two near ties.
    "index_topk": 4096,
    "num_hash_layers": 1,
    "max_position_embeddings": 1 << 16,
    "torch_dtype": "float32",
}
_SIZES_OF_EXPERTS = {
    "dim",
    "inter_dim",
    "moe_inter_dim",
    "shared_expert_inter_dim",
    "moe_latent_size",
    "n_routed_experts",
    "n_activated_experts",
    "n_expert_groups",
    "n_limited_groups",
    "dtype",
    "gate_dtype",
}
"""What of ``model.moe_overrides`` the shrunk model sets by itself; it computes in float32."""
_SMALL_V41 = {name: size for name, size in _SMALL.items() if name != "num_hash_layers"} | {
    # Any blocks hold all entries, as any top-k does.
    "candidate_topk_blocks": 4096,
    "index_head_dim": 32,
    # Of byte_tokenizer: 256 tokens, less upper case and all but one kind of space.
    "engram_compressed_vocab_size": 227,
    "engram_pad_token_id": 2,
    "engram_vocab_size": 64,
    "engram_n_heads": 2,
    "engram_head_dim": 16,
    "num_nextn_predict_layers": 0,
    "dspark_noise_token_id": 0,
}
_SECTIONS = {
    "peft": "LoRA",
    "quantization": "quantization",
    "qat": "quantization-aware training",
    "fp8": "FP8",
    "compile": "compilation",
    "teacher_model": "the teacher",
    "freeze_config": "frozen parameters",
}
_DEGREES = {
    "pp_size": "pipeline stages",
    "ep_size": "expert parallelism",
    "tp_size": "tensor parallelism",
}
_BACKEND = {"attn": ("sdpa", "eager"), "experts": ("torch",), "dispatcher": ("torch",)}
"""What of ``model.backend`` runs as the recipe has it."""
_AS_GIVEN = (
    "sliding_window",
    "hc_mult",
    "num_nextn_predict_layers",
    "routed_scaling_factor",
    "output_hidden_states",
)
_AS_GIVEN_V41 = (
    "sliding_window",
    "hc_mult",
    "routed_scaling_factor",
    "candidate_block_size",
    "engram_max_ngram_size",
)


def shrink(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of a few layers that has every kind of layer of the given one.

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
    as_given = {key: fields[key] for key in _AS_GIVEN if fields.get(key) is not None}
    return {
        **_SMALL,
        **as_given,
        "num_hidden_layers": len(kinds) + 1,
        # Once more the first kind that compresses: a layer above compressed ones.
        "compress_ratios": [*kinds, next((r for r in kinds if r), kinds[0]), *of_predicting],
        "context_parallel": fields.get("context_parallel"),
    }


def shrink_v41(text: Any, context_parallel: Any) -> dict[str, Any]:
    """Return a V4.1 config of a few layers that has every kind of layer of the given one.

    Args:
        text: A ``DeepseekV41TextConfig``.
        context_parallel: The options, which the result has too.
    """
    kept = _layers_of_every_kind(text)
    ratios = text.compress_ratios
    candidates = text.candidate_source_layer_id
    # Early ones: fewer gradients pass through their gates, which enlarge rounding.
    engrams = sum(layer < text.num_hidden_layers for layer in text.engram_layer_ids)
    begin = min(1, len(kept) - 1)
    engram_layers = list(range(len(kept)))[begin : begin + engrams]
    given = {key: getattr(text, key) for key in _AS_GIVEN_V41}
    # Each n-gram's heads hash by primes, the first ones from engram_vocab_size on.
    rows = 512 * _SMALL_V41["engram_n_heads"] * (text.engram_max_ngram_size - 1)  # type: ignore[operator]
    small = {
        **_SMALL_V41,
        **given,
        "num_hidden_layers": len(kept),
        "compress_ratios": [ratios[layer] for layer in kept],
        "kv_source_layer_ids": _places(kept, text.kv_source_layer_ids),
        "index_source_layer_ids": _places(kept, text.index_source_layer_ids),
        "candidate_source_layer_id": kept.index(candidates) if candidates in kept else -1,
        "engram_layer_ids": engram_layers,
        "engram_num_embeddings": [rows] * len(engram_layers),
    }
    return {
        "text_config": small,
        "vision_config": {"num_hidden_layers": 0},
        "torch_dtype": "float32",
        "context_parallel": context_parallel,
    }


def _layers_of_every_kind(text: Any) -> list[int]:
    """Return the first layer of each kind, and for each the source of the entries it attends to.

    A kind is a ratio, what the layer makes or selects by itself, and whether a source of its ratio
    or the candidates come before it.
    """
    kept: dict[Any, set[int]] = {}
    source, sources_of = None, set()
    chosen_by = text.candidate_source_layer_id
    for layer, ratio in enumerate(text.compress_ratios[: text.num_hidden_layers]):
        makes = layer in text.kv_source_layer_ids
        selects = layer in text.index_source_layer_ids
        replaces = makes and ratio in sources_of
        kind = (ratio, makes, selects, replaces, layer == chosen_by, layer > chosen_by >= 0)
        if makes:
            source = layer
            sources_of.add(ratio)
        needed = {layer} if source is None or not ratio else {source, layer}
        kept.setdefault(kind, needed)
    return sorted(set().union(*kept.values()))


def _places(kept: list[int], layers: list[int]) -> list[int]:
    return [place for place, layer in enumerate(kept) if layer in layers]


def model_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe passes to the model beside its config, less sizes and dtypes."""
    model = recipe.get("model") or {}
    settings: dict[str, Any] = {}
    if overrides := model.get("moe_overrides"):
        settings["moe_overrides"] = {
            key: value for key, value in overrides.items() if key not in _SIZES_OF_EXPERTS
        }
    if model.get("mtp_loss_scaling_factor") is not None:
        settings["mtp_loss_scaling_factor"] = model["mtp_loss_scaling_factor"]
    return settings


def left_out(recipe: Mapping[str, Any]) -> list[str]:
    """Name what a recipe trains with and ``verify`` does not run, in words and by setting."""
    found = []
    for section, words in _SECTIONS.items():
        value = recipe.get(section)
        if value and not (isinstance(value, Mapping) and value.get("enabled") is False):
            found.append(f"{words} ({section})")
    distributed = recipe.get("distributed") or {}
    for name, words in _DEGREES.items():
        if (distributed.get(name) or 1) != 1:
            found.append(f"{words} (distributed.{name}: {distributed[name]})")
    if (distributed.get("ep_size") or 1) != 1 and distributed.get("activation_checkpointing"):
        found.append("activation checkpointing as with ep_size above 1 (it ran as with ep_size: 1)")
    strategy = str(distributed.get("strategy") or "fsdp2")
    if strategy.lower() != "fsdp2":
        found.append(f"distributed.strategy: {strategy}")
    model = recipe.get("model") or {}
    options = (model.get("config") or {}).get("context_parallel") or {}
    precision = options.get("compressor_precision", "float32")
    if precision != "float32":  # which needs activations in bfloat16
        found.append(f"context_parallel.compressor_precision: {precision}")
    backend = model.get("backend") or {}
    for name, run in _BACKEND.items():
        if backend.get(name, run[0]) not in run:
            found.append(f"model.backend.{name}: {backend[name]}")
    return found


def left_out_v41(fields: Mapping[str, Any]) -> list[str]:
    """Name what a V4.1 config has beside its backbone, and ``verify`` does not run, in words."""
    images = (fields.get("vision_config") or {}).get("num_hidden_layers") != 0
    return ["quantization of keys", *(["images (model.config.vision_config)"] if images else [])]
