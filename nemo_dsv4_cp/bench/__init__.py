"""Profiling and timing of one layer; nothing here is part of training."""
