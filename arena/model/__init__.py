"""The model: a transformers decoder read through variable-length attention, and a 3-way head."""
