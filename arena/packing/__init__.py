"""Packing: which examples share a micro-batch, and the tensors of a micro-batch."""
