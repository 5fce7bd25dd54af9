# SPDX-License-Identifier: Apache-2.0
"""``python -m nemo_dsv4_cp``."""

from nemo_dsv4_cp.cli.app import app

app()
