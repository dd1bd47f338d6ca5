"""Data: where images come from (sources), how they are cropped (transforms), how batches are made (loaders)."""

MAX_PIXELS = 100_000_000  # larger images are refused, unless the caller allows more
