"""What the machine and its files ask of everybody: whole files or none, caches, timing, devices, memory."""
