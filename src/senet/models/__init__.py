"""The zoo: one family a file, a registry, weights."""
