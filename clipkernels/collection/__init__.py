"""Collections of images: embed them to Parquet, search them, find duplicates."""
