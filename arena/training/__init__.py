"""Training: packed micro-batches to adapters and head, evaluated on the held-out fold, resumable."""
