# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a rank's layer, counted on fake tensors: nothing is computed."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nemo_dsv4_cp.automodel.torch_api import let_fake_tensors_through_collectives
from nemo_dsv4_cp.bench.layer import Case, build
from nemo_dsv4_cp.exchange.collectives import process_group


@dataclass(frozen=True)
class Flops:
    """What one rank's layer computes.

    Attributes:
        case: Which.
        forward: Floating-point operations of its products in forward.
        backward: The same in backward.
    """

    case: Case
    forward: int
    backward: int


def count(case: Case) -> Flops:
    """Run a V4-Flash layer forward and backward on fake tensors and count its products.

    The Triton kernels tell theirs: what the causal view hides does not count. The torch path's
    products count as they are computed, what is masked afterwards too.
    """
    let_fake_tensors_through_collectives()
    with (
        process_group("fake", rank=case.rank, size=case.cp_size) as group,
        FakeTensorMode(),
    ):
        forward = build(case, group, dtype=torch.bfloat16, device=torch.device("cpu"))
        with FlopCounterMode(display=False) as counted:
            out = forward()
        with FlopCounterMode(display=False) as counted_back:
            out.backward(torch.empty_like(out))
    return Flops(case, counted.get_total_flops(), counted_back.get_total_flops())


def draw_documents(seq_len: int, shortest: int, longest: int, seed: int) -> tuple[int, ...]:
    """Draw where documents of ``shortest`` to ``longest`` tokens start in a row that they fill."""
    draw, starts = random.Random(seed), [0]
    while starts[-1] < seq_len:
        starts.append(starts[-1] + draw.randint(shortest, longest))
    return tuple(starts[:-1])
