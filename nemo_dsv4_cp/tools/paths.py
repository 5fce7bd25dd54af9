# SPDX-License-Identifier: Apache-2.0
"""Names of what is compared: AutoModel's own path and the transports of the package."""

AUTOMODEL = "automodel"
"""Name of AutoModel's own path."""
BOUNDARY = "boundary"
ALL_GATHER = "all_gather"
TRANSPORTS = (BOUNDARY, ALL_GATHER)
PATHS = (BOUNDARY, ALL_GATHER, AUTOMODEL)
