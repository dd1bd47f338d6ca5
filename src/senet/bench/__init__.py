"""Benchmarks the cost of SE on this machine, against its plain twin and other engines, after a correctness check."""
