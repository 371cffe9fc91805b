"""The model: a transformers decoder with variable-length attention and a classification head."""
