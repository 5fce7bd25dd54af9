# SPDX-License-Identifier: Apache-2.0
"""How many examples are drawn: few, or with HYPOTHESIS_PROFILE=many as many as take an hour."""

import os

MANY = os.environ.get("HYPOTHESIS_PROFILE") == "many"
