"""Names of what is compared: the host's own path and the transports of the package."""

HOST = "host"
"""Name of AutoModel's own path."""
BOUNDARY = "boundary"
ALL_GATHER = "all_gather"
TRANSPORTS = (BOUNDARY, ALL_GATHER)
PATHS = (BOUNDARY, ALL_GATHER, HOST)
