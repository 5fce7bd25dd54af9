# SPDX-License-Identifier: Apache-2.0
"""How much of the package one layer's forward goes through: ``python -m tests.layer_calls``.

Counts the Python frames of this package in the forward of a balanced ratio-4 layer of V4-Flash, on
fake tensors with the Triton kernels, when the step's context is there: calls, functions, files, and
classes whose methods are called.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import nemo_dsv4_cp
from nemo_dsv4_cp.automodel.torch_api import let_fake_tensors_through_collectives
from nemo_dsv4_cp.bench import layer
from nemo_dsv4_cp.bench.layer import Case, build
from nemo_dsv4_cp.exchange.collectives import process_group

PACKAGE = str(Path(nemo_dsv4_cp.__file__).parent)
BENCH = layer.__file__  # calls the layer


def count() -> dict[str, Any]:
    """Run the forward twice and count the second one's frames, by what they are counted as."""
    case = Case("boundary", 4, 131_072, 8, 7, kernels="triton", balance="on")
    calls: Counter[tuple[str, str]] = Counter()
    classes = set()

    def profile(frame: Any, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(PACKAGE) or file == BENCH:
            return
        calls[Path(file).relative_to(PACKAGE).as_posix(), frame.f_code.co_qualname] += 1
        owner = frame.f_locals.get("self")
        if owner is not None and type(owner).__module__.startswith("nemo_dsv4_cp"):
            classes.add(type(owner).__name__)

    let_fake_tensors_through_collectives()
    with process_group("fake", rank=7, size=8) as group, FakeTensorMode():
        forward = build(case, group, dtype=torch.bfloat16, device=torch.device("cpu"))
        forward()
        sys.setprofile(profile)
        try:
            forward()
        finally:
            sys.setprofile(None)
    return {
        "calls": sum(calls.values()),
        "functions": len(calls),
        "files": len({file for file, _ in calls}),
        "classes": len(classes),
        "most called": calls.most_common(12),
    }


if __name__ == "__main__":
    for name, found in count().items():
        print(f"{name}: {found}")
