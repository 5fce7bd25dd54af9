"""Positions and documents: pure arithmetic, no communication and no host."""
