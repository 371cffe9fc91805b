"""Storage: whole-file writes, locks, manifests, and the mirror that copies checkpoints elsewhere."""
