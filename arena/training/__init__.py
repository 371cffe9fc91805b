"""Training of adapters and head on packed micro-batches, with evaluation on the held-out fold; resumable."""
