# SPDX-License-Identifier: Apache-2.0
"""Each recipe option alone, and some pairs; ``make test-recipes`` runs every pair."""

import pytest

from tests.recipes import results
from tests.recipes.options import BY_NAME, FIXED_PAIRS, SLOW, refusal_of
from tests.recipes.trainings import assert_alike_or_refused, assert_numbers

FAST = [name for name in BY_NAME if name not in SLOW]


def test_the_recipe_without_options_trains_at_cp_2_as_at_cp_1(trainings):
    assert_alike_or_refused(trainings)


@pytest.mark.parametrize("name", FAST)
def test_an_option_trains_at_cp_2_as_at_cp_1_or_is_refused(trainings, record_property, name):
    record_property(results.OPTIONS, [name])
    record_property(results.FOUND, assert_alike_or_refused(trainings, name))


@pytest.mark.parametrize("name", [name for name in FAST if refusal_of(name) is None])
def test_an_option_changes_the_numbers_or_leaves_them_as_it_should(trainings, name):
    assert_numbers(trainings, name)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, marks=pytest.mark.slow if "packed" in pair else (), id="+".join(pair))
        for pair in FIXED_PAIRS
    ],
)
def test_a_pair_trains_at_cp_2_as_at_cp_1_or_is_refused(trainings, record_property, pair):
    record_property(results.OPTIONS, list(pair))
    record_property(results.FOUND, assert_alike_or_refused(trainings, *pair))
