"""Inference: from a trained model and rows to probabilities, averaged over orders and folds, and to a submission."""
