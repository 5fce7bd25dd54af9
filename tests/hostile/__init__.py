# SPDX-License-Identifier: Apache-2.0
"""Ways to break a valid batch or recipe, section by section, and what comes of each."""

from tests.hostile import batches, documents, odd, settings

KINDS = (*batches.KINDS, *documents.KINDS, *settings.KINDS, *odd.KINDS)
