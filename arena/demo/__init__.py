"""The demo's base model: how it is made from nothing."""
