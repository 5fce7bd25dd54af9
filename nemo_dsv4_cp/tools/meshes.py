# SPDX-License-Identifier: Apache-2.0
"""Whether a recipe's parallel sizes multiply out, by the rules that AutoModel starts with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_OF_A_ROW = ("cp_size", "pp_size", "tp_size")
"""Sizes whose product is the ranks that work on one data-parallel share."""


def parallel_sizes(fields: Mapping[str, Any]) -> dict[str, int]:
    """Return ``cp_size``, ``pp_size`` and ``tp_size`` of a recipe, 1 where it names none.

    Raises:
        ValueError: If one is not an integer of 1 or more.
    """
    return {name: _size(fields, "distributed", name) for name in _OF_A_ROW}


def check_sizes(fields: Mapping[str, Any], world: int) -> None:
    """Refuse sizes that AutoModel would refuse once all ``world`` ranks have started.

    Raises:
        ValueError: With the setting, the rule it breaks and values that keep it.
    """
    distributed, steps = fields.get("distributed") or {}, fields.get("step_scheduler") or {}
    sizes = parallel_sizes(fields)
    of_a_row, product = math.prod(sizes.values()), _product(sizes)
    if world % of_a_row:
        others = {name: of_a_row // size for name, size in sizes.items()}
        use = [  # each size that would work if it alone were another
            f"distributed.{name}: {_divisors(world // product_of_others)}"
            for name, product_of_others in others.items()
            if world % product_of_others == 0
        ]
        raise ValueError(
            f"distributed.{product} = {of_a_row} does not divide the {world} ranks; what works is "
            f"{'; or '.join(use) or f'sizes whose product divides {world}'}"
        )
    data = world // of_a_row
    if distributed.get("dp_size") is not None:
        given = _size(fields, "distributed", "dp_size")
        if given != data:
            raise ValueError(
                f"distributed.dp_size={given} times {product} is not the number of ranks, "
                f"{world}; use {data}, or leave it out"
            )
    _check_experts(fields, world // sizes["pp_size"])
    if sizes["pp_size"] > 1 and distributed.get("pipeline") is None:
        raise ValueError(
            f"distributed.pp_size={sizes['pp_size']} needs a schedule, and there is no "
            "distributed.pipeline; add +distributed.pipeline.pp_schedule=1f1b"
        )
    if steps.get("global_batch_size") is not None:
        local = _size(fields, "step_scheduler", "local_batch_size")
        batch = _size(fields, "step_scheduler", "global_batch_size")
        share = local * data
        if batch % share:
            below = batch // share * share
            working = f"{below} or {below + share}" if below else f"{share}"
            raise ValueError(
                f"step_scheduler.global_batch_size={batch} is not a multiple of {share}, which is "
                f"local_batch_size={local} on each of {data} data-parallel ranks; use {working}"
            )


def _size(fields: Mapping[str, Any], section: str, name: str) -> int:
    value = (fields.get(section) or {}).get(name)
    if value is None:
        return 1
    if type(value) is not int or value < 1:
        raise ValueError(f"{section}.{name}={value!r} is not a size; use an integer of 1 or more")
    return value


def _product(sizes: Mapping[str, int]) -> str:
    return " * ".join(f"{name}={size}" for name, size in sizes.items())


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)


def _check_experts(fields: Mapping[str, Any], ranks: int) -> None:
    """Refuse an ``ep_size`` that does not divide the ranks of a stage, or a model's experts."""
    size = _size(fields, "distributed", "ep_size")
    experts = {}
    for section in ("model", "teacher_model"):
        config = (fields.get(section) or {}).get("config") or {}
        for path, found in ("", config), (".text_config", config.get("text_config") or {}):
            if type(found.get("n_routed_experts")) is int:
                experts[f"{section}.config{path}.n_routed_experts"] = found["n_routed_experts"]
    use = f"use {_divisors(math.gcd(ranks, *experts.values()))}"
    if ranks % size:
        raise ValueError(
            f"distributed.ep_size={size} does not divide {ranks}, the ranks of a pipeline stage "
            f"(data, context and tensor parallel); {use}"
        )
    for name, count in experts.items():
        if count % size:
            raise ValueError(f"distributed.ep_size={size} does not divide {name}={count}; {use}")
