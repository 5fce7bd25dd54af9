"""Trainings of combined options: at cp_size 2 as at cp_size 1, or refused before the first step."""

from __future__ import annotations

import json
import re
import shutil
from itertools import count
from pathlib import Path

import pytest

from tests.recipes.comparing import Record, gaps, idle, too_far
from tests.recipes.launching import Failed, Launcher
from tests.recipes.options import BY_NAME, Refusal, launch_of, refusal_of


class Trainings:
    """Launches combinations of options and reads what they recorded.

    Args:
        directory: Receives a directory per launch, which goes once it is read.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._launcher, self._numbers = directory, Launcher(), count()
        self._references: dict[str, Record] = {}

    def record(self, *names: str, cp_size: int) -> Record:
        """Train with these options.

        Raises:
            Failed: If a rank raised.
        """
        launch = launch_of(*names, cp_size=cp_size)
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
        if cp_size == 1 and len({*names} - {"ep"}) <= 1:  # the others are asked for once
            self._references[key] = record
        return record

    def stop(self) -> None:
        """End the processes that launch."""
        self._launcher.stop()


def assert_alike_or_refused(trainings: Trainings, *names: str) -> str:
    """Hold a combination of options to its claim, and return in a few words what was found."""
    refusal = refusal_of(*names)
    if refusal is not None:
        assert_refused(trainings, refusal, *names)
        return "refused"
    cut, whole = (trainings.record(*names, cp_size=cp_size) for cp_size in (2, 1))
    for name in names:
        loss_fn = BY_NAME[name].loss_fn
        if loss_fn is not None:
            assert cut.loss_fn == whole.loss_fn == loss_fn, f"{cut.loss_fn} ran in place of it"
    beyond = too_far(cut, whole)
    assert not beyond, f"cp_size 2 is not cp_size 1:\n{beyond}"
    allowed = [option.idle for name in names if (option := BY_NAME[name]).idle]
    still = idle(whole, "|".join(allowed))
    assert not still, f"these never learn: {still}"
    largest = max(gaps(cut, whole), key=lambda gap: gap.share)
    return f"equal; {largest}"


def assert_refused(trainings: Trainings, refusal: Refusal, *names: str) -> None:
    """Hold a combination to an error before the first optimizer step."""
    with pytest.raises(Failed) as error:
        trainings.record(*names, cp_size=2)
    assert re.search(refusal.message, str(error.value)), str(error.value)[-6000:]
    assert not error.value.trained, "refused after the first step"
