"""The published numbers, and what they are compared with."""
