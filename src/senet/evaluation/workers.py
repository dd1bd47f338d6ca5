"""The default number of processes that load images."""

from __future__ import annotations

import os

from senet.data.images import ArrayStore, FileStore, ImageSet

MAX_WORKERS = 4


def default_workers(images: ImageSet) -> int:
    """The number of loader processes: none for images kept in memory, otherwise one per core, up to four."""
    store = images.store
    if isinstance(store, ArrayStore) or (isinstance(store, FileStore) and store.cache is not None):
        return 0
    if len(images) <= 64:  # starting processes would take longer than loading
        return 0
    # Some platforms do not tell which cores this process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)
