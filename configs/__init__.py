"""Recipes for the host's CLI, shipped inside the wheel as ``nemo_dsv4_cp.configs``."""
