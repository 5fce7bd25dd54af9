# SPDX-License-Identifier: Apache-2.0
"""What the layout of a new pack costs in CPU time, before the first kernel of a step.

``python -m tests.pack_times`` prints medians over packs of 1M tokens on 128 CP ranks.
"""

import random
import statistics
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from unittest.mock import patch

import torch

from nemo_dsv4_cp.attention import step as step_module
from nemo_dsv4_cp.attention.step import LayerKind, StepContext
from nemo_dsv4_cp.bench.layer import Case
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.plan import AttentionPlan
from nemo_dsv4_cp.sequence.row_plan import RowPlan
from nemo_dsv4_cp.tools.sizes import ModelSizes, read_model_fields

RANKS, SEQ_LEN, PACKS = 128, 1 << 20, 40
PARTS = {
    "schedules": (step_module, "Schedules"),
    "exchange plans": (RowPlan, "of"),
    "visible ranges": (AttentionPlan, "visible_ranges"),
}


def a_pack(draw):
    """Draw documents of 1,000 to 200,000 tokens, and the rank that lays them out."""
    starts = [0]
    while starts[-1] < SEQ_LEN:
        starts.append(starts[-1] + draw.randint(1_000, 200_000))
    case = Case("boundary", 4, SEQ_LEN, RANKS, draw.randrange(RANKS), documents=tuple(starts[:-1]))
    return case.layout


def milliseconds(packs=PACKS):
    """Return the milliseconds of each pack, in all and by part."""
    spent = Counter()

    def timed(name, function):
        def call(*args, **kwargs):
            began = time.process_time()
            result = function(*args, **kwargs)
            spent[name] += 1e3 * (time.process_time() - began)
            return result

        return call

    model = ModelSizes.of_fields(read_model_fields("v4_flash"))
    kinds = [LayerKind.of(model, ratio) for ratio in (0, 4, 128)]
    draw, times = random.Random(0), defaultdict(list)
    with ExitStack() as patches:
        for name, (owner, attribute) in PARTS.items():
            function = timed(name, getattr(owner, attribute))
            patches.enter_context(patch.object(owner, attribute, function))
        for _ in range(packs):
            step = StepContext(a_pack(draw), None, ContextParallelOptions())
            spent.clear()
            for kind in kinds:
                timed("in all", step.plan)(kind, torch.device("cpu"))
            for name, took in spent.items():
                times[name].append(took)
    return times


def main():
    torch.set_num_threads(1)
    for name, times in milliseconds().items():
        print(f"{name:16} {statistics.median(times):6.2f} ms, at most {max(times):6.2f}")


if __name__ == "__main__":
    main()
