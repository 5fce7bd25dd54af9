# SPDX-License-Identifier: Apache-2.0
"""What ranks must agree on, and one refusal on all of them where they do not.

Batches are compared over the CP group alone: data ranks rightly differ. So are settings on the
first step, and before over the ranks that share their weights, if AutoModel shards those.
"""

# B batch rows   S tokens a row

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from nemo_dsv4_cp.exchange.collectives import Group, texts_if_different
from nemo_dsv4_cp.gpus import gpu_here
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.packing import Document

_OF_A_MACHINE = {
    f"model.config.{name}" for name in ("_name_or_path", "name_or_path", "transformers_version")
}
"""What tells where a config was found and by what: it may differ from node to node."""
_MOST_NAMED = 8
_REFUSED = "refused"


def settings_of(model: torch.nn.Module) -> dict[str, Any]:
    """Return what a model's numbers and its collectives depend on, by the name that users know.

    Args:
        model: With ``config``, its ``context_parallel`` options among it or not, and ``backend``.
    """
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
        gpu = gpu_here()
        rates = f"{gpu.kernels_per_second / 1e12:.0f} TFLOP/s, {gpu.nvlink_gbs:g} GB/s"
        settings["context_parallel.balance"] = f"auto, by {rates}"
    trained = [parameter.requires_grad for parameter in model.parameters()]
    settings["parameters"] = f"{sum(trained)} trained of {len(trained)}"
    return {name: value for name, value in settings.items() if name not in _OF_A_MACHINE}


def compare_settings(settings: Mapping[str, Any], group: Group | None) -> None:
    """Refuse, on all ranks of a group, settings that differ between them.

    Args:
        settings: From :func:`settings_of`; ranks may name different ones.
        group: Its ranks all call this.

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

    A rank that refuses its batch comes here first: without it the others would wait.

    Args:
        facts: From :func:`facts_of`; not looked at if there is a refusal.
        refusal: Why this rank refuses its batch.
        cp_group: CP group, whose ranks all call this.

    Raises:
        Exception: This rank's own refusal.
        ValueError: For the refusal of another rank, or batches that differ.
    """
    told = facts if refusal is None else {_REFUSED: f"{type(refusal).__name__}: {refusal}"}
    on_ranks = texts_if_different(_text(told), cp_group)
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


def facts_of(
    tensors: Mapping[str, torch.Tensor], documents: Sequence[Sequence[Document]] | None
) -> dict[str, Any]:
    """Return what batches must have in common, as small as numbers.

    Args:
        tensors: Per-token tensors [B, S], any real dtype; equal numbers in another are the same.
        documents: Those of each packed row; None for rows of one document each.
    """
    facts: dict[str, Any] = {}
    for name, tensor in tensors.items():
        facts[f"the shape of {name}"] = list(tensor.shape)
        facts[f"the print of {name}"] = _print(tensor)
    if documents is not None:
        spans = [[(document.start, document.length) for document in row] for row in documents]
        facts["the number of documents"] = sum(map(len, spans))
        facts["the print of the documents"] = zlib.crc32(repr(spans).encode())
    return facts


def _print(numbers: torch.Tensor) -> int:
    """Return a number that other tensors are unlikely to have; exact, so summed in any order."""
    bits = numbers.detach().to(torch.float64).flatten().view(torch.int64)
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)  # odd: no bit is lost
    return int((bits ^ (bits >> 32)).mul(places).sum())


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, of an object its class alone: no address, no set's order."""
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
    """Say of each fact that differs which rank has what."""
    known = {rank: json.loads(text) for rank, text in on_ranks.items()}
    names = sorted({name for facts in known.values() for name in facts})
    found = []
    for name in names:
        ranks_of: dict[str, list[int]] = {}
        for rank, facts in known.items():
            ranks_of.setdefault(facts.get(name, "absent"), []).append(rank)
        if len(ranks_of) > 1:
            said = (f"{value} on rank {', '.join(map(str, r))}" for value, r in ranks_of.items())
            found.append(f"{name} is {' and '.join(said)}")
    more = len(found) - _MOST_NAMED
    return "; ".join(found[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
