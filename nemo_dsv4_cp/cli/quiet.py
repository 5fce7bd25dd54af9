# SPDX-License-Identifier: Apache-2.0
"""Silence for what torch and AutoModel say about themselves while a command runs them."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def quiet() -> Iterator[None]:
    """Drop warnings and log records up to level WARNING; errors still come through.

    What others print, as AutoModel 0.6 does on import, goes to stderr: stdout is for the answer.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)
