# SPDX-License-Identifier: Apache-2.0
"""Every two recipe options together, but for what ``test_options.py`` trains."""

import pytest

from tests.recipes import results
from tests.recipes.options import FIXED_PAIRS, SLOW, pairs
from tests.recipes.trainings import assert_alike_or_refused, assert_numbers

OTHERS = [pair for pair in pairs() if {*pair} not in map(set, FIXED_PAIRS)]


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_option_trains_at_cp_2_as_at_cp_1_or_is_refused(trainings, record_property, name):
    record_property(results.OPTIONS, [name])
    record_property(results.FOUND, assert_alike_or_refused(trainings, name))
    assert_numbers(trainings, name)


@pytest.mark.parametrize("pair", OTHERS, ids="+".join)
def test_a_pair_trains_at_cp_2_as_at_cp_1_or_is_refused(trainings, record_property, pair):
    record_property(results.OPTIONS, list(pair))
    record_property(results.FOUND, assert_alike_or_refused(trainings, *pair))
