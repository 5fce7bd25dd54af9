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
        ValueError: If one is no whole number from 1.
    """
    distributed = fields.get("distributed") or {}
    return {name: _whole(distributed, name, "distributed") for name in _OF_A_ROW}


def check_sizes(fields: Mapping[str, Any], world: int) -> None:
    """Refuse sizes that AutoModel would refuse, once all ranks have started.

    Args:
        fields: A recipe.
        world: Number of ranks that it is launched on.

    Raises:
        ValueError: With the setting, the rule it breaks and values that keep it.
    """
    distributed, steps = fields.get("distributed") or {}, fields.get("step_scheduler") or {}
    sizes = parallel_sizes(fields)
    of_a_row = math.prod(sizes.values())
    if world % of_a_row:
        _refuse_product(sizes, world)
    data = world // of_a_row
    if distributed.get("dp_size") is not None:
        given = _whole(distributed, "dp_size", "distributed")
        if given != data:
            raise ValueError(
                f"distributed.dp_size={given} times {_product(sizes)} is not the number of ranks, "
                f"{world}; use {data}, or leave it out"
            )
    _check_experts(fields, world // sizes["pp_size"])
    if sizes["pp_size"] > 1 and distributed.get("pipeline") is None:
        raise ValueError(
            f"distributed.pp_size={sizes['pp_size']} needs a schedule, and there is no "
            "distributed.pipeline; add +distributed.pipeline.pp_schedule=1f1b"
        )
    if steps.get("global_batch_size") is not None:
        local = _whole(steps, "local_batch_size", "step_scheduler")
        batch = _whole(steps, "global_batch_size", "step_scheduler")
        share = local * data
        if batch % share:
            below = batch // share * share
            use = f"{below} or {below + share}" if below else f"{share}"
            raise ValueError(
                f"step_scheduler.global_batch_size={batch} is not a multiple of {share}, which is "
                f"local_batch_size={local} on each of {data} data-parallel ranks; use {use}"
            )


def _whole(section: Mapping[str, Any], name: str, of: str) -> int:
    value = section.get(name)
    if value is None:
        return 1
    if type(value) is not int or value < 1:
        raise ValueError(f"{of}.{name}={value!r} is no size; use a whole number from 1")
    return value


def _product(sizes: Mapping[str, int]) -> str:
    return " * ".join(f"{name}={size}" for name, size in sizes.items())


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _refuse_product(sizes: Mapping[str, int], world: int) -> None:
    """Raise, naming each size that could be mended alone, with what would mend it."""
    whole = math.prod(sizes.values())
    mends = []
    for name, size in sizes.items():
        others = whole // size
        if world % others == 0:
            working = ", ".join(map(str, _divisors(world // others)))
            mends.append(f"distributed.{name}: {working}")
    said = "; or ".join(mends) or f"sizes whose product divides {world}"
    raise ValueError(
        f"distributed.{_product(sizes)} = {whole} does not divide the {world} ranks; what works is "
        f"{said}"
    )


def _check_experts(fields: Mapping[str, Any], ranks: int) -> None:
    """Refuse an ``ep_size`` that does not divide the ranks of a stage, or a model's experts."""
    size = _whole(fields.get("distributed") or {}, "ep_size", "distributed")
    experts = {}
    for section in ("model", "teacher_model"):
        config = (fields.get(section) or {}).get("config") or {}
        if type(config.get("n_routed_experts")) is int:
            experts[f"{section}.config.n_routed_experts"] = config["n_routed_experts"]
    use = f"use {', '.join(map(str, _divisors(math.gcd(ranks, *experts.values()))))}"
    if ranks % size:
        raise ValueError(
            f"distributed.ep_size={size} does not divide {ranks}, the ranks of a pipeline stage "
            f"(data, context and tensor parallel); {use}"
        )
    for name, count in experts.items():
        if count % size:
            raise ValueError(f"distributed.ep_size={size} does not divide {name}={count}; {use}")
