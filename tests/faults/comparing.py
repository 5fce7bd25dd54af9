# SPDX-License-Identifier: Apache-2.0
"""Losses of a resumed run beside those of one that was never harmed."""

from pathlib import Path

import pytest

from tests.faults.launches import STEPS, losses


def assert_goes_on(resumed: Path, reference: Path, *, step: int) -> None:
    """Compare all steps from the resumed one on.

    Args:
        resumed: The directory of the run that was resumed.
        reference: That of the run that was not.
        step: The first step after the checkpoint.
    """
    found, expected = losses(resumed), losses(reference)
    later = range(step, STEPS)
    for each in later:
        print(f"step {each}: {found[each]:.6f}, never harmed {expected[each]:.6f}")
    assert found[step] == pytest.approx(expected[step], abs=1e-5)
    assert [found[s] for s in later] == pytest.approx([expected[s] for s in later], abs=1e-4)
