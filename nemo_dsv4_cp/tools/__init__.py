"""What the commands stand on."""

HOST = "host"
"""Name of the host's own path in tables."""
