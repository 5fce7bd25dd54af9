# SPDX-License-Identifier: Apache-2.0
"""How many examples are drawn, by HYPOTHESIS_PROFILE.

"fixed", the default, draws the same few on every run; "random" draws others each time, and "many"
as many as take an hour, at random too.
"""

import os

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "fixed")
MANY = PROFILE == "many"


def examples(*, fixed: int, random: int, many: int) -> int:
    """Return how many examples a test draws in this run."""
    return {"fixed": fixed, "many": many}.get(PROFILE, random)
