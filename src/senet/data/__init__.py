"""Image data: where images come from (sources), crops and augmentation (transforms), and batches (loaders)."""

MAX_PIXELS = 100_000_000  # larger images are rejected, unless the caller allows them
