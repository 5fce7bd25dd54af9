# SPDX-License-Identifier: Apache-2.0
"""Stores the job's number of CP ranks on the model, because AutoModel does not pass it.

``model.supports.cp_size`` reads a mesh that no release from 0.5 to 0.7 gives it, so it is always 1.
The function that checks a model against the job's mesh, on all ranks and before it is sharded, is
wrapped instead. It is also where all ranks can agree on kernels.
"""

from __future__ import annotations

from typing import Any

from nemo_automodel._transformers import capabilities

from nemo_dsv4_cp.automodel import patches

FUNCTION = "attach_capabilities_and_validate"
_ATTRIBUTE = "_cp_size_of_job"  # a number: it outlives the copies that pipeline stages are made by


def install() -> None:
    """Have models receive the number of CP ranks; a second call does nothing."""
    patches.wrap(capabilities, FUNCTION, _passing_cp_size)


def cp_size_of(model: Any) -> int:
    """Return the job's ``distributed.cp_size``, 1 for a model that AutoModel did not build."""
    return int(getattr(model, _ATTRIBUTE, 1))


def _passing_cp_size(original: Any, model: Any, mesh: Any) -> Any:
    setattr(model, _ATTRIBUTE, getattr(mesh, "cp_size", 1))
    if hasattr(model, "check_sizes"):
        model.check_sizes(mesh)
    checked = original(model, mesh)
    if hasattr(model, "choose_kernels"):
        model.choose_kernels()
    return checked
