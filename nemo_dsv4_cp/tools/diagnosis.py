# SPDX-License-Identifier: Apache-2.0
"""What of this environment training depends on, and what would make it fail."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version

import torch

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.automodel import contracts
from nemo_dsv4_cp.automodel.contracts import TESTED_RELEASES
from nemo_dsv4_cp.automodel.torch_api import TESTED_TORCH
from nemo_dsv4_cp.checks import certificate

_ARCHITECTURE = "DeepseekV4ContextParallelForCausalLM"
_ARCHITECTURE_V41 = "DeepseekV41ContextParallelForCausalLM"
_NEWEST = TESTED_RELEASES[0]
_TESTED = {"nemo_automodel": TESTED_RELEASES, "torch": TESTED_TORCH}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        remedy: What to do about it; None if nothing need be done.
        fatal: Whether training would fail.
        note: What to know about it, where nothing need be done.
    """

    subject: str
    found: str
    remedy: str | None = None
    fatal: bool = False
    note: str | None = None


def diagnose() -> list[Finding]:
    """Look at versions, entry points, AutoModel's contracts, devices, kernels and known traps."""
    looks = (_versions, _plugins, _automodel_contracts, _devices, _certificates, _kernels)
    return [finding for look in looks for finding in look()]


def _versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < (3, 11)
    yield Finding("Python", python, "install Python 3.11 or newer" if old else None, fatal=old)
    for name in ("nemo_dsv4_cp", "nemo_automodel", "torch", "transformers", "triton"):
        try:
            found = version(name)
        except PackageNotFoundError:
            found = ""
        remedy = note = None
        if name == "nemo_automodel" and not found:
            remedy = f"pip install nemo_automodel=={_NEWEST}"
        elif name == "triton" and not found and torch.cuda.is_available():
            remedy = "AutoModel's LoRA and MoE kernels need it: pip install triton==3.7.1"
        elif name == "triton" and found.startswith("3.9"):
            remedy = "AutoModel's LoRA kernels do not import with it: pip install triton==3.7.1"
        tested = _TESTED.get(name, ())
        # A build's own label, as of 2.10.0+cu128 or of NVIDIA's containers, makes no other version.
        if found and tested and found.partition("+")[0] not in tested:
            note = f"not tested; tested with {', '.join(tested)}"
        fatal = name == "nemo_automodel" and not found
        yield Finding(name, found or "not installed", remedy, fatal, note)


def _plugins() -> Iterator[Finding]:
    for architecture in (_ARCHITECTURE, _ARCHITECTURE_V41):
        ours = entry_points(group=plugins.ARCHITECTURES, name=architecture)
        yield Finding(
            f"{plugins.ARCHITECTURES}: {architecture}",
            ", ".join(point.value for point in ours) or "not declared",
            None if ours else "reinstall the package: pip install --force-reinstall nemo-dsv4-cp",
            fatal=not ours and architecture == _ARCHITECTURE,
        )
    for group in (plugins.TRANSPORTS, plugins.KERNELS, plugins.BATCH_FNS):
        points = entry_points(group=group)
        for point in points:
            try:
                point.load()
            except Exception as error:
                yield Finding(
                    f"{group}: {point.name}",
                    f"{point.value} does not load: {error}",
                    f"fix or uninstall the distribution {point.dist and point.dist.name}, or "
                    "choose another in context_parallel",
                )
            else:
                yield Finding(f"{group}: {point.name}", point.value)


def _automodel_contracts() -> Iterator[Finding]:
    remedy = f"pip install nemo_automodel=={_NEWEST}; the error names what is missing"
    try:
        from nemo_automodel.components.models.deepseek_v4 import model as automodel

        from nemo_dsv4_cp.automodel import mtp, registration

        contract = contracts.batch_contract()
        contracts.check()
    except Exception as error:
        yield Finding("AutoModel's V4 model", f"cannot be used: {error}", remedy, fatal=True)
        return
    yield Finding("AutoModel's V4 model", automodel.__name__)
    yield _automodels_v41()
    yield Finding("contract for batches", contract.NAME)
    inputs = "prepare_mtp_inputs_for_cp" if mtp.ASKS_MODELS else "none"
    yield Finding("contract for MTP under CP", inputs)
    from nemo_automodel._transformers.registry import ModelRegistry

    registration.register(_ARCHITECTURE)  # as naming the config class in YAML does
    known = ModelRegistry.has_custom_model(_ARCHITECTURE)
    found = ModelRegistry.get_model_cls_from_model_arch(_ARCHITECTURE) if known else None
    yield Finding(
        "AutoModel's registry",
        f"{_ARCHITECTURE} -> {getattr(found, '__module__', found)}",
        None if found else "another distribution may claim the name; uninstall it",
        fatal=found is None,
    )


def _automodels_v41() -> Finding:
    """Return whether AutoModel has the V4.1 that we build on; V4 trains without it."""
    subject = "AutoModel's V4.1 model"
    try:
        contracts.check_v41()
    except ImportError as error:
        note = f"recipes of V4.1 need nemo_automodel {_NEWEST}; those of V4 do not need it"
        return Finding(subject, f"cannot be used: {error}", note=note)
    return Finding(subject, "nemo_automodel.components.models.deepseek_v41.model")


def _devices() -> Iterator[Finding]:
    count = torch.cuda.device_count()
    if count:
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Finding("GPUs", f"{count} x {torch.cuda.get_device_name(0)}, {gib:.0f} GiB")
        return
    yield Finding(
        "GPUs",
        f"none; {platform.machine()} CPU",
        "on a CPU: the recipe class nemo_dsv4_cp.automodel.cpu.CpuFinetuneRecipe, "
        "dist_env.backend: gloo, and torchrun, since the automodel launcher counts GPUs",
    )


def _certificates() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        return
    again = "nemo-dsv4-cp verify recipe.yaml --kernels"
    known = certificate.on_disk()
    for each in known:
        found = f"{each.milliseconds or 0:.1f} ms per layer, largest error {each.worst:.0%} of "
        remedy = f"set context_parallel.kernels to auto or torch, or examine them again: {again}"
        yield Finding(
            f"certificate: {each.kernels}",
            each.error or f"{found}the allowed",
            None if each.passed else remedy,
            note=each.report,
        )
    if not known:
        note = f"made before the first step, or by {again}"
        yield Finding("certificates of kernels", "none for this GPU", note=note)


def _kernels() -> Iterator[Finding]:
    gpu = torch.cuda.is_available()
    for name, used_for, instead in (
        ("tilelang", "context_parallel.kernels: tilelang", None),
        ("transformer_engine", "model.backend.attn: te, and ep_size > 1 with CP", "ep_size: 1"),
        ("deep_ep", "model.backend.dispatcher: deepep or hybridep", "dispatcher: torch"),
    ):
        found = importlib.util.find_spec(name) is not None
        remedy = note = None
        if not found and gpu and instead:
            remedy = f"needed by {used_for}; install it, or set {instead}"
        elif not found:
            note = f"needed {'' if gpu else 'on GPUs '}by {used_for}"
        yield Finding(f"kernels: {name}", "found" if found else "not installed", remedy, note=note)
