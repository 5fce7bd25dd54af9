# SPDX-License-Identifier: Apache-2.0
"""Trainings of combined options: at cp_size 2 as at cp_size 1, or refused before the first step."""

from __future__ import annotations

import json
import re
import shutil
from itertools import count
from pathlib import Path

import pytest

from tests.recipes.comparing import Record, gaps, idle, of_parameters, too_far
from tests.recipes.launching import Failed, Launcher
from tests.recipes.options import BY_NAME, Refusal, launch_of, loss_fn_of, refusal_of

DRAWS = 2
"""How many draws of weights must differ. A query whose 48th and 49th best entry are as good up to
rounding picks either, which takes gradients 1e-3 apart: seen with 3 of 240 pairs, each with one
query of 600 (and 24 of its top-k indices). A fault shows with any weights.
"""


class Trainings:
    """Launches combinations of options and reads what they recorded.

    Args:
        directory: Receives a directory per launch, which goes once it is read.
        launcher: Launches them.
    """

    def __init__(self, directory: Path, launcher: Launcher) -> None:
        self._directory, self._launcher, self._numbers = directory, launcher, count()
        self._references: dict[str, Record] = {}

    def record(self, *names: str, cp_size: int, draw: int = 0) -> Record:
        """Train with these options, from weights of some draw.

        Raises:
            Failed: If a rank raised.
        """
        launch = launch_of(*names, cp_size=cp_size, draw=draw)
        key = json.dumps(launch.recipe, sort_keys=True)
        if key in self._references:
            return self._references[key]
        directory = self._directory / f"{next(self._numbers)}_{'+'.join(names)}_cp_{cp_size}"
        directory.mkdir()
        try:
            self._launcher.launch(directory, launch.recipe, launch.processes)
            record = Record.of(directory)
        finally:
            shutil.rmtree(directory)
        if cp_size == 1 and len({*names} - {"ep"}) <= 1:  # the others are needed once
            self._references[key] = record
        return record


def assert_alike_or_refused(trainings: Trainings, *names: str) -> str:
    """Hold a combination of options to its claim, and return in a few words what was found."""
    refusal = refusal_of(*names)
    if refusal is not None:
        assert_refused(trainings, refusal, *names)
        return "refused"
    beyond = []
    for draw in range(DRAWS):
        cut, whole = (trainings.record(*names, cp_size=size, draw=draw) for size in (2, 1))
        beyond.append(too_far(cut, whole))
        if not beyond[-1]:
            break
    assert (cut.loss_fn, whole.loss_fn) == (loss_fn_of(*names),) * 2, "another loss ran"
    assert not beyond[-1], "cp_size 2 is not cp_size 1:\n" + "\nother weights:\n".join(beyond)
    allowed = [option.idle for name in names if (option := BY_NAME[name]).idle]
    still = idle(whole, "|".join(allowed))
    assert not still, f"these never learn: {still}"
    largest = max(gaps(cut, whole), key=lambda gap: gap.share)
    return f"equal; {largest}" + "".join(f"; with other weights\n{each}" for each in beyond[:-1])


def assert_refused(trainings: Trainings, refusal: Refusal, *names: str) -> None:
    """Hold a combination to an error before the first optimizer step."""
    with pytest.raises(Failed) as error:
        trainings.record(*names, cp_size=2)
    assert re.search(refusal.message, str(error.value)), str(error.value)[-6000:]
    assert not error.value.trained, "refused after the first step"


def assert_numbers(trainings: Trainings, name: str) -> None:
    """Hold an option to the numbers at cp_size 1 that its entry claims: others, or the same."""
    option = BY_NAME[name]
    like = [] if option.same_as in (None, "base") else [option.same_as]
    expected = trainings.record(*like, cp_size=1)
    found = trainings.record(name, cp_size=1)
    if option.same_as is None:
        changed = (found.losses, found.norms) != (expected.losses, expected.norms)
        assert changed, "the option has no effect"
        return
    parameters = expected.gradients[0]
    beyond = too_far(of_parameters(found, parameters), of_parameters(expected, parameters))
    assert not beyond, f"the numbers are not those of {option.same_as}:\n{beyond}"
