# SPDX-License-Identifier: Apache-2.0
"""The sizes of a model, out of a config's fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from nemo_dsv4_cp.checks.model_layers import selects
from nemo_dsv4_cp.tools.layers import Layer

GIB = 1 << 30
MODELS = ("v4_flash", "v4_pro")
"""Models of V4 whose sizes the package holds."""
V41_FLASH = "v41_flash"
_PUBLISHED = {
    "deepseek-ai/DeepSeek-V4-Flash": "v4_flash",
    "deepseek-ai/DeepSeek-V4-Pro": "v4_pro",
    "deepseek-ai/DeepSeek-V4.1-Flash": V41_FLASH,
}


Warn = Callable[[str], object]
"""Receives a line if the package's own sizes stand in for a config of the hub."""


@dataclass(frozen=True)
class ModelSizes:
    """The fields of a ``DeepseekV4Config`` that costs depend on, under its names.

    Attributes:
        compress_ratios: One ratio for each of ``num_hidden_layers`` layers, without MTP's.
        indexer_loss: ``context_parallel.indexer_loss.mode``, empty without a loss.
    """

    compress_ratios: tuple[int, ...]
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
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
    indexer_loss: str = dataclasses.field(default="", kw_only=True)

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> ModelSizes:
        """Take the sizes out of a config's fields; AutoModel's defaults for those it leaves out.

        Returns:
            :class:`ModelSizesV41` for a config of V4.1.

        Raises:
            ValueError: If there are no compress ratios, or a field is no size.
        """
        if is_v41(fields):
            return ModelSizesV41._of_fields(fields.get("text_config") or fields)
        return cls._of_fields(fields)

    @classmethod
    def _of_fields(cls, fields: Mapping[str, Any]) -> ModelSizes:
        # Only what is no field of a config has a default.
        of_config = (f for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING)
        wanted = [field.name for field in of_config]
        if "compress_ratios" in fields and any(name not in fields for name in wanted):
            fields = {**_defaults(cls is ModelSizesV41), **fields}
        missing = [name for name in wanted if fields.get(name) is None]
        if missing:
            raise ValueError(
                f"the model's fields lack {', '.join(missing)}; give a complete DeepSeek-V4 "
                f"config, or one of {', '.join((*MODELS, V41_FLASH))}"
            )
        sizes = {name: _size(name, fields[name]) for name in wanted}
        ratios, layers = sizes["compress_ratios"], sizes["num_hidden_layers"]
        if cls is ModelSizes and any(ratio in (1, 2) for ratio in ratios):
            raise ValueError(
                "compress_ratios holds 1 or 2, ratios of DeepSeek-V4.1, without "
                "kv_source_layer_ids; give the whole text_config of a V4.1 config"
            )
        if len(ratios) < layers:
            raise ValueError(
                f"compress_ratios holds {len(ratios)} ratios for num_hidden_layers={layers}; give "
                "one per layer"
            )
        return cls(**sizes | {"compress_ratios": ratios[:layers]})

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The kind of each layer."""
        return tuple(Layer.v4(ratio, self.indexer_loss) for ratio in self.compress_ratios)


@dataclass(frozen=True)
class ModelSizesV41(ModelSizes):
    """The fields of a ``DeepseekV41TextConfig`` that costs depend on, under its names."""

    kv_source_layer_ids: tuple[int, ...]
    index_source_layer_ids: tuple[int, ...]
    candidate_source_layer_id: int
    candidate_topk_blocks: int
    candidate_block_size: int
    engram_layer_ids: tuple[int, ...]
    engram_n_heads: int
    engram_head_dim: int
    engram_max_ngram_size: int

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The kind of each layer."""
        return tuple(
            Layer(ratio, layer in self.kv_source_layer_ids, selects(self, layer) or "", shares=True)
            for layer, ratio in enumerate(self.compress_ratios)
        )

    @property
    def engrams(self) -> list[int]:
        """The layers that look up n-grams."""
        return [layer for layer in self.engram_layer_ids if layer < self.num_hidden_layers]


_OF_LAYERS = {
    "compress_ratios": "0, 4 or 128 for each layer (V4.1: 0, 1 or 2)",
    "kv_source_layer_ids": "numbers of layers",
    "index_source_layer_ids": "numbers of layers",
    "engram_layer_ids": "numbers of layers",
}
"""Fields that are lists, and what they hold."""
_LEAST = {"n_shared_experts": 0, "candidate_source_layer_id": -1, "candidate_topk_blocks": 0}


def _size(name: str, value: Any) -> Any:
    """Return a field's value if it is of its kind, lists as tuples."""
    if name not in _OF_LAYERS:
        if type(value) is not int or value < _LEAST.get(name, 1):
            raise ValueError(f"{name}={value!r} is not a size; use an integer of 1 or more")
        return value
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name}={value!r} is not a list; use {_OF_LAYERS[name]}")
    for each in value:
        if type(each) is not int or each < 0:
            raise ValueError(f"{name} holds {each!r}; use {_OF_LAYERS[name]}")
    return tuple(value)


def is_v41(fields: Mapping[str, Any]) -> bool:
    """Return whether these are the fields of a V4.1 config, or of its text_config."""
    named = (fields.get("_target_"), fields.get("model_type"), *(fields.get("architectures") or ()))
    return any(name in fields for name in ("text_config", "kv_source_layer_ids")) or any(
        "deepseekv41" in str(name).lower().replace("_", "") for name in named
    )


def read_model_fields(source: str, warn: Warn | None = None) -> dict[str, Any]:
    """Read a model's config fields.

    Args:
        source: One of :data:`MODELS` or :data:`V41_FLASH`; the path of a config.json or YAML file
            whose fields, or the published model they name, stand at the top, under ``config``,
            ``model`` or ``model.config``; or a published model itself, as :func:`published_fields`
            takes it.
        warn: See :data:`Warn`.

    Raises:
        ValueError: If there is no such file or no such fields in it.
    """
    if source in (*MODELS, V41_FLASH):
        return _packaged(source)
    if source in _PUBLISHED or Path(source).is_dir():
        return published_fields(source, warn)
    try:
        text = Path(source).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if _cached(source):
            return published_fields(source, warn)
        raise ValueError(
            f"model {source!r} cannot be read; use {', '.join((*MODELS, V41_FLASH))}, the path of "
            "a config.json or YAML file, or a model of the hub whose config is cached"
        ) from error
    try:
        # YAML's own reading of JSON would take 1e-06 for text.
        tree = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        message = f"model {source!r} is neither JSON nor YAML; give a model's config"
        raise ValueError(message) from error
    naming = None
    for step in (None, "model", "config"):
        if step is not None and isinstance(tree, dict) and isinstance(tree.get(step), dict):
            tree = tree[step]
        if isinstance(tree, dict) and "compress_ratios" in (tree.get("text_config") or tree):
            return tree
        if isinstance(tree, dict) and tree.get("pretrained_model_name_or_path"):
            naming = tree
    if naming is not None:
        return complete_fields(naming, warn)
    raise ValueError(
        f"model {source!r} names no compress_ratios, at the top, under config or under "
        "model.config; give a DeepSeek-V4 config"
    )


def complete_fields(fields: Mapping[str, Any], warn: Warn | None = None) -> dict[str, Any]:
    """Return a recipe's config fields, with those of the published model that they name beneath.

    Raises:
        ValueError: If the published model's config is not to be had.
    """
    named = fields.get("pretrained_model_name_or_path")
    text = fields.get("text_config") or {}
    if (text or fields).get("compress_ratios") or not named:
        return dict(fields)
    published = published_fields(str(named), warn)
    if "text_config" in published:
        return {**published, **fields, "text_config": {**published["text_config"], **text}}
    return published | dict(fields)


def published_fields(source: str, warn: Warn | None = None) -> dict[str, Any]:
    """Return the fields of a published model's config.

    Args:
        source: Path of a ``config.json`` or of the directory that holds it, or the id of a model on
            the hub: one whose config is cached, or one whose sizes the package holds.
        warn: See :data:`Warn`.

    Raises:
        ValueError: If there is no such config.
    """
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        path = _cached(source) or path
    if path.is_file():
        fields: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return fields
    if source not in _PUBLISHED:
        raise ValueError(
            f"{source!r} is neither a config.json, nor a directory with one, nor a model of the "
            "hub whose config is cached; download it with: hf download "
            f"{source} config.json"
        )
    name = _PUBLISHED[source]
    if warn is not None:
        warn(
            f"The config of {source} is not in the hub's cache, so the package's sizes of {name} "
            f"stand in for it; to cache it: hf download {source} config.json"
        )
    fields = _packaged(name)
    if "text_config" in fields:
        return fields
    # The packaged recipes leave out the layers for multi-token prediction; the ratios name them.
    predicting = len(fields["compress_ratios"]) - fields["num_hidden_layers"]
    return fields | {"num_nextn_predict_layers": predicting}


def _defaults(v41: bool) -> dict[str, Any]:
    """Return the fields of AutoModel's default config; none of V4.1 where AutoModel lacks it."""
    if not v41:
        from nemo_automodel.components.models.deepseek_v4.config import (  # takes seconds
            DeepseekV4Config,
        )

        return dict(DeepseekV4Config().to_dict())
    with suppress(ImportError):
        from nemo_automodel.components.models.deepseek_v41.config import DeepseekV41TextConfig

        return dict(DeepseekV41TextConfig().to_dict())
    return {}


def _packaged(name: str) -> dict[str, Any]:
    text = (files("nemo_dsv4_cp.configs") / "model" / f"{name}.yaml").read_text("utf-8")
    fields: dict[str, Any] = yaml.safe_load(text)["config"]
    if "text_config" in fields:  # beside it stand references to other settings
        return {"text_config": fields["text_config"]}
    return fields


def _cached(source: str) -> Path | None:
    """Return the config of a model of the hub, where its cache holds it."""
    if source.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache  # takes half a second

    try:
        cached = try_to_load_from_cache(source, "config.json")
    except ValueError:  # a path that is no model's id
        return None
    return Path(cached) if isinstance(cached, str) else None
