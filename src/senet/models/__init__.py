"""The zoo: one family of networks per file, and a registry."""
