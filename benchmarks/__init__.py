"""The benchmark: our batches beside what people use, on the same weights, rows and precision."""
