"""Storage: atomic writes, locks, manifests, results in verified parts, and a mirror of checkpoints elsewhere."""
