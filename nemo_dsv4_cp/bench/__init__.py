"""What a layer costs one rank, measured side by side for the host's path and each transport."""

HOST = "host"
"""Name of the host's own path in tables."""
