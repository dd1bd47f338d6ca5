"""Access to the system, shared by all packages: atomic files, the cache folder, timing, devices, and memory."""
