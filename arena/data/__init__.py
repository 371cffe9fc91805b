"""Data: from the competition's files to checked conversations, folds and token ids."""
