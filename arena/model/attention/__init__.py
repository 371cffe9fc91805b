"""Variable-length attention over packed examples: one signature, several backends, chosen by what a device can run."""
