"""The demo's base model: how it is trained from scratch."""
