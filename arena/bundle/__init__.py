"""A folder to upload to Kaggle: wheels, judges, a notebook and metadata."""
