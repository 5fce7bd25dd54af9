# SPDX-License-Identifier: Apache-2.0
"""Two trainings of one recipe, compared: losses, gradient norms and every parameter's gradient."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nemo_dsv4_cp.tools.verification import GRADIENT_LIMIT, gradient_limit

LOSS_LIMIT = 1e-5
NORM_LIMIT = 5e-5
"""Relative to the reference's norm."""


@dataclass(frozen=True)
class Record:
    """What ``recording.RecordingRecipe`` wrote, of all pipeline stages."""

    loss_fn: str
    frozen_adapters: list[str]
    """Adapters of LoRA that were made and are not trained."""
    losses: list[float]
    norms: list[float]
    validation: list[float]
    gradients: list[dict[str, torch.Tensor]]
    """By parameter, one dictionary per step."""
    scales: list[dict[str, torch.Tensor]]
    """Parameters of hyper-connections, which tell the size of the terms of their gradients."""

    @classmethod
    def of(cls, directory: Path) -> Record:
        """Read the record of a launch."""
        stages: list[dict[str, Any]] = [
            torch.load(path) for path in sorted(directory.glob("record_*.pt"))
        ]
        merged = stages[0]
        for stage in stages[1:]:
            for key in ("gradients", "scales"):
                for step, of_stage in zip(merged[key], stage[key], strict=True):
                    step |= of_stage
        return cls(**merged)


@dataclass(frozen=True)
class Gap:
    """How far a number is from the reference's, and how far it may be."""

    name: str
    value: float
    limit: float

    @property
    def share(self) -> float:
        """The part of the limit that is used; above 1 is too much."""
        return self.value / self.limit if self.value == self.value else float("inf")

    def __str__(self) -> str:
        return f"{self.name} differs by {self.value:.2e}, allowed {self.limit:.2e}"


def gaps(found: Record, expected: Record) -> list[Gap]:
    """Return every difference between two trainings.

    Raises:
        AssertionError: They do not have the same steps, parameters or validations.
    """
    for key in ("losses", "norms", "validation"):
        here, there = getattr(found, key), getattr(expected, key)
        assert len(here) == len(there), f"{key}: {here} and {there}"
    differences = []
    for step, (here, there) in enumerate(zip(found.losses, expected.losses, strict=True)):
        differences.append(Gap(f"loss of step {step}", abs(here - there), LOSS_LIMIT))
    for step, (here, there) in enumerate(zip(found.validation, expected.validation, strict=True)):
        differences.append(Gap(f"validation loss of step {step}", abs(here - there), LOSS_LIMIT))
    for step, (here, there) in enumerate(zip(found.norms, expected.norms, strict=True)):
        value = abs(here - there) / there
        differences.append(Gap(f"gradient norm of step {step}", value, NORM_LIMIT))
    for step, gradients in enumerate(found.gradients):
        reference = expected.gradients[step]
        assert gradients.keys() == reference.keys(), gradients.keys() ^ reference.keys()
        scales = _with_gradients(expected.scales[step], reference)
        for name, gradient in gradients.items():
            largest = reference[name].abs().max().clamp(min=1e-30)
            value = float((gradient - reference[name]).abs().max() / largest)
            limit = gradient_limit(name, scales) if name in scales else GRADIENT_LIMIT
            differences.append(Gap(f"gradient of {name} at step {step}", value, limit))
    return differences


def _with_gradients(
    values: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]
) -> dict[str, torch.nn.Parameter]:
    parameters = {name: torch.nn.Parameter(value) for name, value in values.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    return parameters


def too_far(found: Record, expected: Record, *, most: int = 8) -> str:
    """Return the differences beyond their limits, the furthest first, or an empty string."""
    beyond = [gap for gap in gaps(found, expected) if not gap.share <= 1]
    beyond.sort(key=lambda gap: -gap.share)
    lines = [str(gap) for gap in beyond[:most]]
    if len(beyond) > most:
        lines.append(f"and {len(beyond) - most} more")
    return "\n".join(lines)


def idle(record: Record, allowed: str | None) -> list[str]:
    """Return what should learn and does not: frozen adapters, and gradients of zero on all steps.

    Args:
        record: A training.
        allowed: Regular expression of the parameters that need no gradient.
    """
    still = [
        name
        for name in record.gradients[0]
        if not any(step[name].any() for step in record.gradients)
        and not (allowed and re.search(allowed, name))
    ]
    return record.frozen_adapters + still


def of_parameters(record: Record, parameters: Collection[str]) -> Record:
    """Return a record of some parameters alone, and of no validation."""
    gradients = [{name: step[name] for name in parameters} for step in record.gradients]
    return replace(record, gradients=gradients, validation=[])
