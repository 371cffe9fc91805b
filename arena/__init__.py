"""Judges of pairwise preference, trained and run on packed, padding-free batches."""

__version__ = "0.1.0"
