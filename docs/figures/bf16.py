# SPDX-License-Identifier: Apache-2.0
"""Train the tiny recipe in bfloat16 with three seeds at CP=1, 2 and 4, and draw the losses.

Run it with: python docs/figures/bf16.py FOLDER
(an hour or two on two cores; runs whose losses are already in FOLDER are not repeated)

It draws bf16.svg next to itself, and fails where context parallelism takes a loss further from
CP=1's than rounding does in the first steps, or than another seed does later.
"""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import yaml
from draw import INK, STYLE, save
from matplotlib.figure import Figure

from nemo_dsv4_cp.cli.demo import train
from nemo_dsv4_cp.tools.recipes import compose

CP_SIZES = (1, 2, 4)
SEEDS = (1, 2, 3)
STEPS = 300
AVERAGED = 20
"""Steps that a curve is averaged over: one step's loss is that of its 2,000 bytes of text."""
FIRST_STEPS = 3
ROUNDING = 2**-8
"""bfloat16's, of a loss in the first steps."""

Curves = dict[tuple[int, int], torch.Tensor]
"""Losses [steps] by CP size and seed."""


def main() -> None:
    """Train what is missing, draw, compare."""
    folder = Path(sys.argv[1])
    curves: Curves = {
        (cp_size, seed): torch.tensor(_losses(folder, cp_size, seed))
        for seed in SEEDS
        for cp_size in CP_SIZES
    }
    averaged = {run: losses.unfold(0, AVERAGED, 1).mean(-1) for run, losses in curves.items()}
    with plt.rc_context(STYLE):
        save(_drawn(averaged), "bf16.svg")
    sys.exit("\n".join(_complaints(curves, averaged)) or 0)


def recipe(seed: int) -> dict[str, object]:
    """Return the tiny recipe with AutoModel's own precision: bfloat16, gradients summed in float32.

    Only the parameters' dtype is set here; all else is AutoModel's default `mp_policy`.
    """
    fields = compose("tiny_cpu").fields
    fields["seed"] = seed
    fields["model"]["torch_dtype"] = "bfloat16"
    del fields["distributed"]["mp_policy"]
    fields["step_scheduler"]["max_steps"] = STEPS
    return fields


def _losses(folder: Path, cp_size: int, seed: int) -> list[float]:
    """Return the losses of a run, which is made if the folder does not hold them."""
    directory = folder / f"cp_{cp_size}_seed_{seed}"
    done = directory / "losses.json"
    if not done.exists():
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe(seed)))
        training = train(file, cp_size=cp_size, directory=directory, on_step=lambda done: None)
        print(f"CP={cp_size}, seed {seed}: {training.seconds:.0f} s", flush=True)
        done.write_text(json.dumps(training.losses))
    losses: list[float] = json.loads(done.read_text())
    return losses


def _complaints(curves: Curves, averaged: Curves) -> list[str]:
    """Print how far curves are apart, and return what is further than it may be."""
    found = []

    def apart(a: tuple[int, int], b: tuple[int, int]) -> torch.Tensor:
        return (averaged[a] - averaged[b]).abs()

    seeds = torch.stack([apart((1, a), (1, b)) for a, b in combinations(SEEDS, 2)])
    print(f"CP=1's seeds: apart by {seeds.mean():.4f} on average, {seeds.max():.4f} at most")
    for cp_size in CP_SIZES[1:]:
        for seed in SEEDS:
            name, ours, reference = f"CP={cp_size}, seed {seed}", (cp_size, seed), (1, seed)
            first = (curves[ours] / curves[reference] - 1).abs()[:FIRST_STEPS]
            later = apart(ours, reference)
            print(
                f"{name}: within {first.max():.1e} of CP=1's first {FIRST_STEPS} losses, then "
                f"apart by {later.mean():.4f} on average, {later.max():.4f} at most"
            )
            if first.max() > ROUNDING:
                found.append(f"{name} differs from CP=1 by more than rounding at first")
            if later.mean() > seeds.mean() or later.max() > seeds.max():
                found.append(f"{name} is further from CP=1 than another seed is")
    return found


def _drawn(averaged: Curves) -> Figure:
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 5.2), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    steps = range(AVERAGED, STEPS + 1)
    one_rank = torch.stack([averaged[1, seed] for seed in SEEDS])
    mean = one_rank.mean(0)
    styles = {1: (INK, "-"), 2: ("#c0504d", "--"), 4: ("#5b9bd5", ":")}
    for axes, base in ((above, torch.zeros_like(mean)), (below, mean)):
        low, high = one_rank.amin(0) - base, one_rank.amax(0) - base
        axes.fill_between(steps, low, high, color="#d9d9d9", lw=0, label="between CP=1's seeds")
        for (cp_size, seed), losses in averaged.items():
            color, dashes = styles[cp_size]
            label = f"CP={cp_size}, three seeds" if seed == SEEDS[0] else None
            axes.plot(steps, losses - base, dashes, color=color, lw=1, label=label)
    above.set_ylabel(f"loss, mean of {AVERAGED} steps")
    below.set_ylabel("less the mean\nof CP=1's seeds")
    below.set_xlabel("step")
    above.legend()
    return figure


if __name__ == "__main__":
    main()
