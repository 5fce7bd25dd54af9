# SPDX-License-Identifier: Apache-2.0
"""What ranks must agree on, and one refusal on all of them where they do not.

Batches are compared over the CP group alone, since data ranks rightly differ; settings too, on the
first step, and before that over the ranks among which AutoModel shards the weights.
"""

# B batch rows   S tokens a row

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from nemo_dsv4_cp.exchange.collectives import Group, texts_if_different
from nemo_dsv4_cp.gpus import gpu_here
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.packing import Documents, on_cpu_together

_OF_A_MACHINE = {
    f"model.config.{name}" for name in ("_name_or_path", "name_or_path", "transformers_version")
}
"""Where a config was found and by what: it may differ from node to node."""
_MOST_NAMED = 8
_REFUSED = "refused"


def settings_of(model: torch.nn.Module) -> dict[str, Any]:
    """Return what a model's numbers and its collectives depend on, by the name that users know."""
    config: Any = model.config
    options = ContextParallelOptions.of(config)
    settings: dict[str, Any] = {name: version(name) for name in ("nemo-dsv4-cp", "nemo_automodel")}
    for part, fields in (
        ("context_parallel", vars(options)),
        ("model.backend", vars(model.backend)),
        ("model.config", config.to_dict()),
    ):
        settings |= {f"{part}.{name}": value for name, value in fields.items()}
    if options.balance == "auto":  # decided by these on each rank for itself, so they must agree
        gpu = getattr(model.model, "gpu", None) or gpu_here()
        rates = f"{gpu.kernels_per_second / 1e12:.0f} TFLOP/s"
        rates += f", {gpu.nvlink_gbs:g} and {gpu.network_gbs:g} GB/s"
        settings["context_parallel.balance"] = f"auto, by {rates}"
    trained = [parameter.requires_grad for parameter in model.parameters()]
    settings["parameters"] = f"{sum(trained)} trained of {len(trained)}"
    return {name: value for name, value in settings.items() if name not in _OF_A_MACHINE}


def compare_settings(settings: Mapping[str, Any], group: Group | None) -> None:
    """Refuse, on all ranks of a group, which all call this, settings that differ between them.

    Raises:
        ValueError: Naming what differs, and which rank of the job has which value.
    """
    on_ranks = texts_if_different(_text(settings), group)
    if on_ranks is not None:
        raise ValueError(
            f"the ranks of one model have different settings: {_differences(on_ranks)}; start all "
            "of them with one recipe, and install the same releases on every node"
        )


def compare_batches(
    facts: Mapping[str, Any], refusal: Exception | None, cp_group: Group | None
) -> None:
    """Refuse, on all ranks of the group, batches that differ or that a rank refuses.

    All ranks call this, one that refuses its batch too: without it the others would wait.

    Raises:
        Exception: This rank's own refusal.
        ValueError: For the refusal of another rank, or batches that differ.
    """
    sent = facts if refusal is None else {_REFUSED: f"{type(refusal).__name__}: {refusal}"}
    on_ranks = texts_if_different(_text(sent), cp_group)
    if refusal is not None:
        raise refusal
    if on_ranks is None:
        return
    for rank, text in on_ranks.items():
        if _REFUSED in (others := json.loads(text)):
            raise ValueError(
                f"rank {rank} of this CP group refuses its batch, so that all do: "
                f"{json.loads(others[_REFUSED])}"
            )
    raise ValueError(
        f"the ranks of one CP group hold different batches: {_differences(on_ranks)}; every CP "
        "rank must load the same samples (the sampler's rank is the data-parallel rank, not the "
        "global one)"
    )


def facts_of(tensors: Mapping[str, torch.Tensor], documents: Documents | None) -> dict[str, Any]:
    """Return shapes and checksums that batches must have in common, whatever their dtypes."""
    facts: dict[str, Any] = {}
    checksums = on_cpu_together([_checksum(tensor) for tensor in tensors.values()])
    for (name, tensor), checksum in zip(tensors.items(), checksums, strict=True):
        facts[f"the shape of {name}"] = list(tensor.shape)
        facts[f"the checksum of {name}"] = int(checksum)
    if documents is not None:
        spans = documents.spans()
        facts["the number of documents"] = sum(map(len, spans))
        facts["the checksum of the documents"] = zlib.crc32(repr(spans).encode())
    return facts


def _checksum(numbers: torch.Tensor) -> torch.Tensor:
    """Return a sum that other tensors are unlikely to have, exact in any order, int64."""
    bits = numbers.detach().to(torch.float64).flatten().view(torch.int64)
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)  # odd: no bit is lost
    return (bits ^ (bits >> 32)).mul(places).sum()


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold; of an object its class alone, without its address."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value) if isinstance(value, torch.dtype) else type(value).__qualname__


def _text(facts: Mapping[str, Any]) -> str:
    """Return facts as one text, each value a text of its own: they are compared and shown."""
    texts = {name: json.dumps(_plain(value), sort_keys=True) for name, value in facts.items()}
    return json.dumps(texts, sort_keys=True)


def _differences(on_ranks: Mapping[int, str]) -> str:
    """Describe for each fact that differs which rank has what."""
    known = {rank: json.loads(text) for rank, text in on_ranks.items()}
    found = []
    for name in sorted({name for facts in known.values() for name in facts}):
        ranks_of: dict[str, list[int]] = {}
        for rank, facts in known.items():
            ranks_of.setdefault(facts.get(name, "absent"), []).append(rank)
        if len(ranks_of) > 1:
            parts = (f"{value} on rank {', '.join(map(str, r))}" for value, r in ranks_of.items())
            found.append(f"{name} is {' and '.join(parts)}")
    more = len(found) - _MOST_NAMED
    return "; ".join(found[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
