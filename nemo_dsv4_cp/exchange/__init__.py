"""All that crosses ranks."""
