"""Counts of parameters, multiply-adds, and memory, next to the figures that the paper prints."""
