"""The sizes of a model, out of a config's fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

GIB = 1 << 30
MODELS = ("v4_flash", "v4_pro")
"""Models whose sizes the package holds."""


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
