"""Checkpoints kept away from the machine, at any URL that fsspec knows, and brought back to a fresh one."""
