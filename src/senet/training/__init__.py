"""Training: a run, from its first batch to its last file, through interruptions."""
