"""Data: where images come from (sources), how they are cropped (transforms), how batches are made (loaders)."""
