"""The zoo: one family a file, and a registry."""
