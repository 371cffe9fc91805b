"""Makes the tiny Gemma-2 that the demo recipe fine-tunes."""
