"""The demo's rows, whose best possible log-loss is known."""
