"""Errors of trained networks, and their predictions."""
