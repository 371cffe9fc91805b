"""Copies of checkpoints at any URL that fsspec supports, from which a fresh machine restores a run."""
