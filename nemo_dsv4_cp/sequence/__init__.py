"""Positions and documents: pure arithmetic, no communication, no AutoModel."""
