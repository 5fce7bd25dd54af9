# SPDX-License-Identifier: Apache-2.0
"""Complete AutoModel recipes composed from the Hydra tree in ``nemo_dsv4_cp.configs``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import local_seq_multiple
from nemo_dsv4_cp.tools.meshes import parallel_sizes
from nemo_dsv4_cp.tools.sizes import is_v41, published_fields

_CONFIGS = "nemo_dsv4_cp.configs"
_BLOCK = "context_parallel"
_READS_BLOCK = (("model", "config"), ("teacher_model", "config"))


@dataclass(frozen=True)
class Recipe:
    """A composed recipe: what AutoModel's CLI loads, resolved, and the processes to start."""

    fields: dict[str, Any]
    nodes: int
    processes_per_node: int

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.nodes * self.processes_per_node

    @property
    def on_cpu(self) -> bool:
        """Return whether the ranks are CPU processes."""
        return bool(self.fields["dist_env"]["backend"] == "gloo")


def names() -> list[str]:
    """Return the recipes that can be composed."""
    return _stems(files(_CONFIGS))


def choices() -> dict[str, list[str]]:
    """Return the options of every config group."""
    groups = {group.name: _stems(group) for group in files(_CONFIGS).iterdir() if group.is_dir()}
    return {name: options for name, options in sorted(groups.items()) if options}


def _stems(folder: Traversable) -> list[str]:
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def compose(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Compose one of :func:`names` with overrides in Hydra's grammar, and resolve everything in it.

    Raises:
        hydra.errors.HydraException: For a name, group or override that does not exist or parse.
        omegaconf.errors.OmegaConfBaseException: For a value that cannot be resolved.
        ValueError: For a parallel size that is none.
    """
    register_resolvers()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module(_CONFIGS, version_base="1.3"):
        config = hydra.compose(name, list(overrides))
    fields: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    variables = fields.pop("vars")
    processes = variables["processes_per_node"]
    if processes is None:
        processes = math.prod(parallel_sizes(fields).values())
    return Recipe(fields, variables["nodes"], processes)


def check_context_parallel(fields: Mapping[str, Any]) -> None:
    """Refuse ``context_parallel`` blocks that no config reads, and values that cannot work.

    Raises:
        ValueError: With the setting and what works.
    """
    for place, holder in _mappings(fields):
        block = holder.get(_BLOCK)
        if place in _READS_BLOCK:
            options = ContextParallelOptions.from_block(block)
            ratios, v41 = holder.get("compress_ratios"), is_v41(holder)
            options.resolve_pad_multiple(ratios)
            if options.enabled:
                options.check_model(ratios, v41=v41)
        elif _BLOCK in holder:
            path = ".".join([*place, _BLOCK])
            raise ValueError(
                f"{path}: nothing reads it there; {_BLOCK} belongs under model.config: use "
                f"++model.config.{_BLOCK}{_first_key(block)}"
            )


def _mappings(
    tree: Mapping[str, Any], place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield every mapping of a tree but ``context_parallel`` blocks, and the keys to it."""
    yield place, tree
    for key, value in tree.items():
        if isinstance(value, Mapping) and key != _BLOCK:
            yield from _mappings(value, (*place, str(key)))


def _first_key(block: Any) -> str:
    """Return a block's first setting as an override has it, such as ``.overlap=false``."""
    if not isinstance(block, Mapping) or not block:
        return ""
    key, value = next(iter(block.items()))
    return f".{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"


def register_resolvers() -> None:
    """Make two resolvers known to OmegaConf.

    ``${dsv4_cp.compress_ratios:SOURCE}`` is :func:`compress_ratios`, and without a source those of
    the composed model. ``${dsv4_cp.local_seq_multiple:RATIOS}`` is what a shard's length must be a
    multiple of.
    """

    def of_composed_or_named(source: str | None = None, *, _root_: DictConfig) -> list[int]:
        config = _root_.model.config
        text = config.get("text_config") or config  # V4.1's fields stand below
        if source is None and text.get("compress_ratios") is not None:
            return [int(ratio) for ratio in text.compress_ratios]
        return compress_ratios(source or config.pretrained_model_name_or_path)

    OmegaConf.register_new_resolver("dsv4_cp.compress_ratios", of_composed_or_named, replace=True)
    OmegaConf.register_new_resolver("dsv4_cp.local_seq_multiple", local_seq_multiple, replace=True)


def compress_ratios(source: str) -> list[int]:
    """Return the compress ratios of a published model, one per layer.

    Raises:
        ValueError: If there is no such config, or it has no compress ratios.
    """
    ratios = published_fields(source).get("compress_ratios")
    if ratios is None:
        raise ValueError(f"{source} has no compress_ratios; is it a DeepSeek-V4 config?")
    return [int(ratio) for ratio in ratios]
